"""What the user sees: answers on standard output, the rest on standard error, in colour or not."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

PLAIN, DRAFTED = "", "drafted"
_FAINT, _GREEN, _RED, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE = _PICTURES | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters -> visible stand-ins: no text from a model may control the terminal."""


def is_dumb() -> bool:
    """Whether the terminal lacks escape sequences."""
    return os.environ.get("TERM", "") in ("", "dumb", "unknown")


def has_colour(stream: TextIO) -> bool:
    """Whether a stream may be coloured: it is a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not is_dumb() and not os.environ.get("NO_COLOR")


class Screen:
    """Writes answers, and notes about them."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._open: TextIO | None = None  # the stream whose last line has not ended
        self._thinking = False
        self._lock = threading.RLock()  # the engine's thread writes notes as well
        self.legend = "green: drafted" if has_colour(self._out) else "[...]: drafted"

    def answer(self, pieces: Iterable[tuple[str, str]]) -> None:
        """Write more of the answer, as (style, text); the line stays open."""
        if self._thinking:
            self.end_line()
            self._write(self._err, "\n")
            self._thinking = False
        self._write(
            self._out, "".join(self._marked(style, text) for style, text in _joined(pieces))
        )

    def reasoning(self, text: str) -> None:
        """Write more of the reasoning before an answer."""
        if not self._thinking:
            self.end_line()
            text = text.lstrip("\n")
            if not has_colour(self._err):
                text = f"(thinking) {text}"
        self._thinking = True
        self._write(self._err, self._painted(self._err, _FAINT, text))

    def end_line(self) -> None:
        """Make whatever comes next start on a new line."""
        if self._open is not None:
            self._write(self._open, "\n")

    def end_answer(self) -> None:
        """Close the answer, complete or not."""
        self.end_line()
        self._thinking = False

    def note(self, text: str, gap: bool = False) -> None:
        """Write something about an answer, on one line or several.

        gap  whether an empty line follows
        """
        with self._lock:
            answering = self._open is self._out and not self._is_one_place()
            if not answering:
                self.end_line()
            ends = "\n\n" if gap else "\n"
            self._write(self._err, self._painted(self._err, _FAINT, self._wrapped(text)) + ends)
            if answering:  # elsewhere, as into a file: a note on the terminal breaks no line there
                self._open = self._out

    def tell(self, text: str) -> None:
        """Write what a command was asked to show."""
        self.end_line()
        self._write(self._err, self._safe(self._err, text) + "\n")

    def error(self, text: str) -> None:
        """Write what went wrong."""
        self.end_line()
        self._write(self._err, self._painted(self._err, _RED, self._wrapped(text)) + "\n")

    @contextmanager
    def notes_log(self) -> Iterator[None]:
        """While the block runs, log messages of all threads are notes, so none starts mid-line."""
        root, notes = logging.getLogger(), _Notes(self)
        before, root.handlers = root.handlers, [notes]
        try:
            yield
        finally:
            root.handlers = before

    def _is_one_place(self) -> bool:
        """Whether answers and notes go to the same terminal or file."""
        if self._out is self._err or (self._out.isatty() and self._err.isatty()):
            return True
        try:
            return os.path.sameopenfile(self._out.fileno(), self._err.fileno())
        except OSError:  # not files of the system
            return False

    def _marked(self, style: str, text: str) -> str:
        if style == PLAIN or not text:
            return self._safe(self._out, text)
        if has_colour(self._out):
            return self._painted(self._out, _GREEN, text)
        return f"[{self._safe(self._out, text)}]"

    def _painted(self, stream: TextIO, style: str, text: str) -> str:
        safe = self._safe(stream, text)
        return f"{style}{safe}{_RESET}" if safe and has_colour(stream) else safe

    def _wrapped(self, text: str) -> str:
        """The text in lines that fit the terminal, broken between words."""
        if not self._err.isatty():
            return text
        width = max(shutil.get_terminal_size().columns - 1, 20)
        how = {"width": width, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(line, **how) for line in text.splitlines())

    def _safe(self, stream: TextIO, text: str) -> str:
        return text.translate(_VISIBLE) if stream.isatty() else text

    def _write(self, stream: TextIO, text: str) -> None:
        if not text:
            return
        with self._lock:
            stream.write(text)
            stream.flush()
            self._open = None if text.endswith(("\n", f"\n{_RESET}")) else stream


class _Notes(logging.Handler):
    def __init__(self, screen: Screen):
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._screen.note(self.format(record))
        except Exception:  # as in every logging handler: a failure to log must not end the program
            self.handleError(record)


def _joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pieces with neighbours of the same style joined, without empty ones."""
    found: list[tuple[str, str]] = []
    for style, text in pieces:
        if found and found[-1][0] == style:
            found[-1] = style, found[-1][1] + text
        elif text:
            found.append((style, text))
    return found
