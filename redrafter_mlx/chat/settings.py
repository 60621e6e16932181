"""The settings that can be changed during a chat: an answer's options, named as their flags."""

from __future__ import annotations

import dataclasses
import json
import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from redrafter_mlx.config import (
    ChatOptions,
    DrafterOptions,
    DraftOptions,
    EngineOptions,
    Options,
    SamplingOptions,
    budget_size,
    from_flags,
    option,
    token_biases,
)
from redrafter_mlx.errors import UserError

ON, OFF = ("on", "true", "yes"), ("off", "false", "no")
NONE, DEFAULT = "none", "default"
DRAFTERS = (DEFAULT, "max_gram", NONE)
"""Names of the engine's drafters; its own constants would import mlx with them."""


@dataclass(frozen=True)
class Drafting(Options):
    """Which of the loaded drafters is used."""

    drafter: str = option(
        DEFAULT,
        "drafter: default (as the chat was started), max_gram or none; the words are the same",
        type=str,
        choices=DRAFTERS,
    )


@dataclass(frozen=True)
class Settings:
    """Everything that an answer depends on besides the conversation. Changes make a copy."""

    chat: ChatOptions = field(default_factory=ChatOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    drafting: Drafting = field(default_factory=Drafting)

    @classmethod
    def from_flags(cls, flags: Namespace) -> Settings:
        """The settings that the command was started with."""
        return cls(
            *(from_flags(group, flags) for group in (ChatOptions, SamplingOptions, DraftOptions))
        )

    def __iter__(self) -> Iterator[tuple[dataclasses.Field, Any]]:
        """Each option and its value."""
        for part in fields(self):
            group = getattr(self, part.name)
            for f in fields(group):
                yield f, getattr(group, f.name)

    def find(self, name: str) -> tuple[dataclasses.Field, Any]:
        """The option with that name, written as in Python or as a flag, and its value.

        Raises UserError for an unknown name, listing those that exist.
        """
        wanted = field_name(name)
        for f, value in self:
            if f.name == wanted:
                return f, value
        fixed = {f.name for group in (DrafterOptions, EngineOptions) for f in fields(group)}
        if wanted in fixed | {"model", "no_draft", "adapter_path", "revision"}:
            raise UserError(
                f"--{setting_name(wanted)} can only be set at the start: leave, and start with it"
            )
        names = ", ".join(setting_name(f.name) for f, _ in self)
        raise UserError(f"there is no setting {name!r}; there are: {names}")

    def put(self, name: str, value: Any) -> Settings:
        """These settings with one value changed.

        Raises UserError for an unknown name and for a value that is not allowed.
        """
        f, _ = self.find(name)
        if isinstance(value, list):
            value = tuple(value)
        choices = f.metadata["flag"].get("choices")
        is_bool = f.metadata["type"] is bool
        if (is_bool and not isinstance(value, bool)) or (choices and value not in choices):
            raise _wrong(f, value)
        groups = {part.name: getattr(self, part.name) for part in fields(self)}
        part, group = next((n, group) for n, group in groups.items() if f in fields(group))
        try:
            return replace(self, **{part: replace(group, **{f.name: value})})
        except UserError as error:  # it names the flag, but a setting was typed
            typed = setting_name(f.name)
            raise UserError(str(error).replace(f"--{typed}", typed)) from error

    def put_text(self, name: str, text: str) -> Settings:
        """`put` with the value as it was typed."""
        f, _ = self.find(name)
        try:
            value = _parsed(f, text)
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise _wrong(f, text) from error
        return self.put(name, value)

    def as_dict(self) -> dict[str, Any]:
        """All settings, for JSON."""
        return {f.name: value for f, value in self}

    def with_all(self, values: dict[str, Any]) -> Settings:
        """These settings with other values, as read from JSON; raises as `put` does."""
        found = self
        for name, value in values.items():
            found = found.put(name, _from_json(self.find(name)[0], value))
        return found

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return {f.name: value for f, value in self if value != f.default}


def setting_name(name: str) -> str:
    """The name as it is written in flags, without the dashes in front."""
    return name.replace("_", "-")


def field_name(name: str) -> str:
    """The name as it is written in Python."""
    return name.removeprefix("--").lower().replace("-", "_")


def shown(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool):
        return ON[0] if value else OFF[0]
    if value is None or value == ():
        return NONE
    if isinstance(value, tuple):
        return shlex.join(str(part) for part in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def takes(f: dataclasses.Field) -> str:
    """The values that an option takes, in words."""
    kind, choices = f.metadata["type"], f.metadata["flag"].get("choices")
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    words = {
        bool: "on or off",
        int: "a whole number",
        float: "a number",
        dict: 'JSON such as {"42": -1.5}',
        budget_size: "auto or a whole number",
        str: "text",
    }[kind]
    if isinstance(f.default, tuple):
        words = {int: "whole numbers", str: "words, in quotes where there are spaces"}[kind]
    return words if f.default not in (None, ()) else f"{words}, or {NONE}"


def values_of(f: dataclasses.Field) -> list[str]:
    """The words that an option may be set to, for completion; numbers are left out."""
    known = list(f.metadata["flag"].get("choices") or ())
    if f.metadata["type"] is bool:
        known = [ON[0], OFF[0]]
    if f.metadata["type"] is budget_size:
        known = ["auto"]
    return [*known, *([NONE] if f.default in (None, ()) else [])]


def _parsed(f: dataclasses.Field, text: str) -> Any:
    kind, word = f.metadata["type"], text.strip().lower()
    if word == DEFAULT or (word == NONE and f.default in (None, ())):
        return f.default
    if kind is bool:
        return word in ON if word in ON + OFF else text
    if kind is dict:
        return token_biases(text)
    if isinstance(f.default, tuple):
        words = json.loads(text) if text.lstrip().startswith("[") else shlex.split(text)
        return tuple(kind(part) for part in words)
    return kind(text.strip())


def _from_json(f: dataclasses.Field, value: Any) -> Any:
    if f.metadata["type"] is not dict or not isinstance(value, dict):
        return value
    try:
        return token_biases(json.dumps(value))  # JSON has turned the token ids into strings
    except ArgumentTypeError as error:
        raise _wrong(f, value) from error


def _wrong(f: dataclasses.Field, value: Any) -> UserError:
    return UserError(f"{setting_name(f.name)} takes {takes(f)}, not {value!r}")
