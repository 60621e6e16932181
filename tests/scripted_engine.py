"""An engine that says what it is told to, and a server in a thread: for tests of the protocols."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mlx_lm.tokenizer_utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from redrafter_mlx.config import EngineOptions, GenerationOptions
from redrafter_mlx.engine import DraftedTree, Piece, QueueFull, Request, Stopping, Ticket, Turn
from redrafter_mlx.engine.engine import Totals
from redrafter_mlx.generation import Token
from redrafter_mlx.rounds.stats import Stats
from redrafter_mlx.server.app import Server
from redrafter_mlx.server.models import Models
from redrafter_mlx.server.options import ServerOptions
from redrafter_mlx.server.plan import Defaults
from redrafter_mlx.server.serving import bind, uvicorn_of
from redrafter_mlx.stream import turns_of_text

MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS]
CHAT = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": {{ tool_call.name | tojson }}, "arguments": '
    "{% for key, value in tool_call.arguments.items() %}[{{ key }}={{ value }}]{% endfor %}}"
    "</tool_call>{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if mood is defined %}{{ mood }}{% endif %}{% endif %}"
)
PLAIN_CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def save_tokenizer(path: Path, template: str | None, special: list[str]) -> None:
    """A tokenizer of bytes and special tokens."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def byte_tokenizer(path: Path, template: str | None = CHAT, special: list[str] = SPECIAL):
    """Such a tokenizer as mlx-lm wraps it; with CHAT it thinks and calls tools."""
    save_tokenizer(path, template, special)
    return mlx_lm.tokenizer_utils.load(path)


class ScriptedEngine:
    """Has the interface of Engine, and answers by `script`: a text for each request, or an error.

    step     tokens of a turn
    seconds  between turns
    queue    most requests at a time; above that QueueFull
    """

    def __init__(
        self,
        tokenizer,
        script: Callable[[Request], str | Exception],
        step: int = 3,
        seconds: float = 0.0,
        queue: int = 10_000,
        context: int | None = 4096,
        name: str = "scripted",
    ):
        self.script, self.step, self.seconds, self.queue = script, step, seconds, queue
        self.served = SimpleNamespace(
            name=name,
            tokenizer=tokenizer,
            context=context,
            drafters={"default": None, "max_gram": None, "none": None},
            target=SimpleNamespace(vocab_size=len(tokenizer)),
        )
        self.options, self.totals = EngineOptions(), Totals()
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self._threads: list[threading.Thread] = []
        self._cut_at: float | None = None

    def start(self):
        return self

    @property
    def is_alive(self) -> bool:
        return self._cut_at is None

    @property
    def running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def status(self) -> dict:
        return {"running": self.running, "waiting": 0, "prefixes": 0, "prefix_bytes": 0}

    def submit(self, request: Request, deliver: Callable[[Turn], None]) -> Ticket:
        if self._cut_at is not None:
            raise Stopping
        if self.running >= self.queue:
            raise QueueFull(self.queue, 2.5)
        ticket = Ticket(request, deliver)
        self.requests.append(request)
        self.tickets.append(ticket)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._answer, args=(ticket,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return ticket

    def stop(self, grace: float = 0.0) -> None:
        self._cut_at = time.monotonic() + grace
        for thread in self._threads:
            thread.join()

    def _answer(self, ticket: Ticket) -> None:
        for turn in self._turns(ticket):
            is_cut = self._cut_at is not None and time.monotonic() > self._cut_at
            if is_cut or ticket.is_cancelled:
                turn = Turn(finish_reason="cancelled", stats=turn.stats)
            try:
                ticket.deliver(turn)
            except Exception:
                ticket.cancel()
            if turn.finish_reason:
                reason = turn.finish_reason
                self.totals.finished[reason] = self.totals.finished.get(reason, 0) + 1
                return
            time.sleep(self.seconds)

    def _turns(self, ticket: Ticket) -> Iterator[Turn]:
        request, tokenizer = ticket.request, self.served.tokenizer
        seed = request.sampling.seed if request.sampling.temp else None
        stats = Stats(prompt_tokens=len(request.prompt), cached_tokens=len(request.prompt) // 2)
        yield Turn(prompt_done=1, stats=stats.as_dict(), seed=seed)
        text = self.script(request)
        if isinstance(text, Exception):
            yield Turn(finish_reason="error", error=text, stats=stats.as_dict())
            return
        said = tokenizer.encode(text, add_special_tokens=False)
        run = _Scripted([*said, tokenizer.eos_token_id], request.generation, stats, self.step)
        pieces = []
        for event in turns_of_text(run, tokenizer):
            pieces.append(self._piece(request, event.token, event.text, event.from_draft))
            if not event.end_of_round:
                continue
            found = [piece.token for piece in pieces]
            yield Turn(
                pieces,
                len(request.prompt),
                stats.as_dict(),
                DraftedTree(found, list(range(-1, len(found) - 1)), list(range(len(found)))),
                event.finish_reason,
                seed=seed,
                kept=event.kept,
                stopped_by=event.stopped_by,
            )
            pieces = []

    @staticmethod
    def _piece(request: Request, token: int, text: str, drafted: bool) -> Piece:
        if request.top_logprobs is None:
            return Piece(text, token, drafted)
        top = [(token, -0.5), (0, float("-inf"))][: request.top_logprobs]
        return Piece(text, token, drafted, -0.5, top)


class _Scripted:
    """A Generation that says these tokens, `step` of them in a round."""

    def __init__(self, tokens: list[int], options: GenerationOptions, stats: Stats, step: int):
        self.options, self.stats = options, stats
        self._tokens, self._step = tokens, step

    def turns(self) -> Iterator[Token]:
        most = self.options.max_tokens
        cut = 0 <= most < len(self._tokens)
        tokens = self._tokens[:most] if cut else self._tokens
        for place, token in enumerate(tokens):
            drafted, is_last = place % self._step > 0, place == len(tokens) - 1
            self.stats.rounds += not drafted
            self.stats.nodes += 1
            self.stats.drafted += drafted
            self.stats.count(drafted, place % self._step)
            reason = ("length" if cut else "stop") if is_last else None
            end = is_last or place % self._step == self._step - 1
            yield Token(token, drafted, reason, end, None)


@contextmanager
def serving(engine, options: ServerOptions | None = None, defaults=None, make=None, allowed=None):
    """A server of an engine in a thread: yields its address and the Server."""
    options = options or ServerOptions(port=0)
    models = Models(engine, make, allowed)
    server = Server(models, defaults or Defaults(), options)
    http, listening = uvicorn_of(server), bind(options)
    host, port = listening.getsockname()[:2]
    thread = threading.Thread(
        target=lambda: asyncio.run(http.serve(sockets=[listening])), daemon=True
    )
    thread.start()
    wait_until(lambda: http.started)
    try:
        yield f"http://{host}:{port}", server
    finally:
        http.should_exit = True
        models.engine.stop()
        thread.join(20)
        assert not thread.is_alive()


def wait_until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread brings about; an error if it does not."""
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
