"""The target model that a head was made for: its sizes and tokenizer, never its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter_mlx.drafters.tensors import read_json
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import hub, places
from redrafter_mlx.machine.storage import one_line

from .head import Head
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

    def size(self, key: str) -> int | None:
        """A size in its config.json, None if it is not there."""
        settings = read_json(self.path / "config.json")
        inner = setting(settings, f"text_config.{key}")
        found = setting(settings, key) if inner is None else inner
        return found if isinstance(found, int) else None

    def check_fits(self, head: Head) -> None:
        """Refuse a target of other sizes than the head's, where the head tells them."""
        for key, needed in (("hidden_size", head.hidden_size), ("vocab_size", head.vocab_size)):
            found = self.size(key)
            if found is not None and needed and found != needed:
                raise UserError(
                    f"--target {self.name} has {key} {found}, the head was made for "
                    f"{needed}: it belongs to another target"
                )

    def tokenizer(self) -> Any:
        """mlx-lm's tokenizer of the target."""
        from mlx_lm.utils import load_tokenizer

        try:
            # Otherwise it warns of texts longer than the model's context.
            return load_tokenizer(self.path, tokenizer_config_extra={"model_max_length": 10**9})
        except Exception as error:  # tokenizer code may raise anything
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
