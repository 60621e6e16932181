"""A conversation: its messages, and the file that /save keeps it in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redrafter_mlx.cli import is_text
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line, write_whole

FORMAT = "redrafter_mlx_chat"
"""The key that marks a file as a saved chat; its value is the version of the format."""
VERSION = 1
LARGEST = 64 * 2**20
"""Size in bytes above which a file is not read."""

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages with role and content, the user's and the model's in turn.

    system    the system message; empty: none
    messages  all others; the last is the user's if it has not been answered
    """

    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def with_system(self, messages: list[Message] | None = None) -> list[Message]:
        """The system message and then all messages, or these, as a chat template takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + (self.messages if messages is None else messages)

    @property
    def unanswered(self) -> str | None:
        """The user's last message, if it has not been answered."""
        last = self.messages[-1] if self.messages else {"role": ""}
        return last["content"] if last["role"] == "user" else None

    def asked(self, text: str) -> list[Message]:
        """The messages and a new one of the user's, which replaces an unanswered one."""
        kept = self.messages if self.unanswered is None else self.messages[:-1]
        return [*kept, {"role": "user", "content": text}]

    def asked_again(self) -> list[Message]:
        """The messages up to the user's last one.

        Raises UserError if there is none.
        """
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise UserError("nothing was asked so far: type a message")
        return self.messages[: places[-1] + 1]

    def undo(self) -> str:
        """Take back the user's last message and its answer; returns the message.

        Raises UserError if there is none.
        """
        *kept, last = self.asked_again()
        self.messages = kept
        return last["content"]

    def save(self, path: Path, model: str, settings: dict[str, Any]) -> None:
        """Write the file, completely or not at all.

        Raises UserError if it cannot be written, or would replace a file that is not a saved chat.
        """
        if path.exists():
            if not path.is_file():
                raise UserError(f"{path} is not a file: give another name")
            try:
                load(path)
            except UserError as error:
                message = f"{path} exists and is not a saved chat: give another name"
                raise UserError(message) from error
        if not path.resolve().parent.is_dir():
            raise UserError(f"there is no directory {path.parent}: make it, or give another name")
        content = {
            FORMAT: VERSION,
            "model": model,
            "messages": self.with_system(),
            "settings": settings,
        }
        try:
            text = json.dumps(content, ensure_ascii=False, indent=1)
            write_whole(path.resolve(), text + "\n", private=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {one_line(error)}") from error


def load(path: Path) -> tuple[Conversation, str, dict[str, Any]]:
    """The conversation in a file, its model's name, and its settings by name, not yet checked.

    Raises UserError if the file cannot be read or is not what `Conversation.save` writes.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB: it is not a saved chat")
        content = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a saved chat: {one_line(error)}") from error
    if not isinstance(content, dict) or content.get(FORMAT) != VERSION:
        raise UserError(
            f'{path} is not a saved chat: it lacks the "{FORMAT}": {VERSION} that /save writes'
        )
    settings = content.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings must be an object, not {_shortly(settings)}")
    conversation = _conversation(path, content.get("messages"))
    return conversation, _text(path, "model", content.get("model", "")), settings


def _conversation(path: Path, messages: Any) -> Conversation:
    if not isinstance(messages, list):
        raise UserError(f"{path}: messages must be a list, not {_shortly(messages)}")
    found, expected = Conversation(), ("system", "user")
    for place, message in enumerate(messages):
        name = f"messages[{place}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UserError(
                f"{path}: {name} must have a role and a content, not be {_shortly(message)}"
            )
        role = message["role"]
        if role not in expected:
            raise UserError(
                f"{path}: the role of {name} must be {' or '.join(expected)}, not {_shortly(role)}"
            )
        content = _text(path, f"the content of {name}", message["content"])
        expected = ("assistant",) if role == "user" else ("user",)
        if role == "system":
            found.system = content
        else:
            found.messages.append({"role": role, "content": content})
    return found


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise UserError(f"{path}: {name} must be text, not {_shortly(value)}")
    return value


def _shortly(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
