"""The target model that a head was made for: its sizes and tokenizer, never its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter_mlx import hub, places
from redrafter_mlx.drafters.checkpoint import read_json
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.errors import UserError
from redrafter_mlx.storage import one_line

from .layouts import setting

FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "tokenizer*"]


@dataclass(frozen=True)
class Target:
    """A target by its name and its files.

    repo  org/name, if it is a Hugging Face repo
    """

    name: str
    path: Path
    repo: str | None = None

    def check_fits(self, config: HeadConfig) -> None:
        """Refuse a target of other sizes than the head's."""
        settings = read_json(self.path / "config.json")
        for key in ("hidden_size", "vocab_size"):
            inner = setting(settings, f"text_config.{key}")
            found = setting(settings, key) if inner is None else inner
            if isinstance(found, int) and found != getattr(config, key):
                raise UserError(
                    f"--target {self.name} has {key} {found}, the head was made for "
                    f"{getattr(config, key)}: it belongs to another target"
                )

    def tokenizer(self) -> Any:
        """mlx-lm's tokenizer of the target."""
        from mlx_lm.utils import load_tokenizer

        try:
            # Else it warns of texts longer than the model's context.
            return load_tokenizer(self.path, tokenizer_config_extra={"model_max_length": 10**9})
        except Exception as error:  # tokenizer code raises what it likes
            raise UserError(
                f"--target {self.name}: its tokenizer cannot be loaded: {one_line(error)}"
            ) from error


def find_target(name: str) -> Target:
    """The target `name`: demo, a directory, a .gguf file, or a Hugging Face repo.

    Of a repo only the settings and the tokenizer are downloaded.
    """
    if places.is_repo_id(name) and not places.expanded(name).exists():
        path = places.snapshot(name, None, FILES, places.TARGET_NAMES)
        if not (path / "config.json").is_file():
            raise UserError(f"--target {name} has no config.json, so it is not a model")
        return Target(name, path, repo=name)
    return Target(name, hub.resolve_target(name))
