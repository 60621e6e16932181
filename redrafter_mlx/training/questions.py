"""Reads the user's own prompts: --data, a file of JSON lines or of plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter_mlx.errors import UserError

NAMED = 5
"""Broken lines that an error names one by one."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """What one line asks of the target.

    turns    the user's turns, or one text
    system   the system turn; "" without one
    is_text  the target continues its beginning, rather than answer it
    """

    turns: tuple[str, ...]
    system: str = ""
    is_text: bool = False


def read_questions(path: Path, skip_bad: bool = False) -> tuple[list[Question], int]:
    """The questions of a data file, and how many broken lines were left out.

    A .txt file holds texts with empty lines between them. Any other file holds one JSON value in
    each line: {"messages": [{"role": ..., "content": ...}, ...]}, {"turns": [...]},
    {"prompt": ...}, {"text": ...} or a string, which is a text. Answers in it are left out: the
    target writes its own. Empty lines are skipped.

    Raises UserError for a file that cannot be read or holds nothing usable, and, unless
    `skip_bad`, for broken lines.
    """
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from error
    found, bad = [], {}
    for number, line in _paragraphs(raw) if path.suffix == ".txt" else _lines(raw):
        try:
            text = line.decode("utf-8")
            found.append(
                Question((text,), is_text=True) if path.suffix == ".txt" else _question(text)
            )
        except (ValueError, RecursionError) as error:
            bad[number] = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
    if bad and not skip_bad:
        number, reason = next(iter(bad.items()))
        raise UserError(
            f"--data {path}: {_named(list(bad))} cannot be used (line {number}: {reason}); "
            "give --skip-bad to leave them out"
        )
    if not found:
        raise UserError(f"--data {path} has no usable line; give JSON lines such as "
                        '{"prompt": "Why is the sky blue?"}')  # fmt: skip
    return found, len(bad)


def _lines(raw: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _paragraphs(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Texts between empty lines, each with the number of its first line."""
    first, text = 1, []
    for number, line in enumerate([*raw.split(b"\n"), b""], start=1):
        if line.strip():
            text.append(line)
            continue
        if text:
            yield first, b"\n".join(text).strip()
        first, text = number + 1, []


def _question(line: str) -> Question:
    """Raises ValueError with the reason when a line asks nothing."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError("not JSON") from error
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise ValueError("neither an object nor a string")
    keys = [key for key in ("messages", "turns", "prompt", "text") if key in value]
    if not keys:
        raise ValueError("none of messages, turns, prompt and text")
    given = value[keys[0]]
    if keys[0] == "messages":
        return _conversation(given)
    if keys[0] == "turns":
        if not isinstance(given, list) or not given:
            raise ValueError("turns is not a list of strings")
        return Question(tuple(_said(turn) for turn in given))
    return Question((_said(given),), is_text=keys[0] == "text")


def _conversation(messages: Any) -> Question:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is not a list of objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"role {message.get('role')!r} is none of {', '.join(ROLES)}")
    turns = [_said(m.get("content")) for m in messages if m["role"] == "user"]
    system = [_said(m.get("content")) for m in messages if m["role"] == "system"]
    if not turns:
        raise ValueError("no user turn")
    return Question(tuple(turns), "\n\n".join(system))


def _said(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its content is empty or not a text")
    text.encode("utf-8")  # JSON can name half a surrogate pair, which no tokenizer takes
    return text.strip()


def _named(numbers: list[int]) -> str:
    """ "line 3", "lines 3 and 17", "lines 3, 17, 20, 21, 22 and 5 more"."""
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    more = len(numbers) - NAMED
    shown = [str(number) for number in numbers[:NAMED]] + ([f"{more} more"] if more > 0 else [])
    return f"lines {', '.join(shown[:-1])} and {shown[-1]}"
