"""Options of the server alone."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter_mlx.config import GenerationOptions, Options, option
from redrafter_mlx.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class AnswerOptions(GenerationOptions):
    """When answers stop, and how prompts are read."""

    max_tokens: int = option(
        -1, "most tokens of an answer, unless its request says (-1: what the context holds)", low=-1
    )


@dataclass(frozen=True)
class ServerOptions(Options):
    """Who may send requests, and how large they may be."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: the whole network")
    port: int = option(8080, "port to listen on (0: any free one)", low=0, high=65535)
    api_key: tuple[str, ...] = option(
        (),
        "key that requests must carry; may be repeated, or be set as REDRAFTER_MLX_API_KEY, which "
        "other users of this machine cannot see",
        type=str,
        action="append",
        metavar="KEY",
    )
    cors: tuple[str, ...] = option(
        (), "web pages that may send requests, such as https://chat.example.org, or *", type=str,
        nargs="+", metavar="ORIGIN",
    )  # fmt: skip
    max_body: float = option(16.0, "largest request in MB", low=0.001)
    context: int | None = option(
        None,
        "most tokens of prompt and answer together (default: as many as the model has positions)",
        low=2,
        type=int,
    )
    request_timeout: float = option(3600.0, "most seconds for one request", low=0.1)
    grace: float = option(
        30.0, "seconds that running requests have to finish after Ctrl-C or SIGTERM", low=0.0
    )
    log_text: bool = option(False, "log the text of requests and answers as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.api_key):
            raise UserError("--api-key is empty: give a key, or leave it out to let anyone in")
        if not all(key.isascii() and key.isprintable() for key in self.api_key):
            raise UserError("--api-key must be of ASCII characters: it travels in a header")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
