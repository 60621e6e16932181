"""Where messages come from: a terminal with a line editor, a dumb terminal, or a pipe."""

from __future__ import annotations

import logging
import os
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from redrafter_mlx.chat.commands import COMMANDS, goes_on
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import cache_directory, write_whole

PROMPT, MORE = "> ", ". "
MOST_HISTORY = 2**20
"""Size in bytes above which the older half of the history is dropped."""
_log = logging.getLogger("redrafter_mlx")

Completions = Callable[[str], tuple[Iterable[str], int]]
"""The text before the cursor -> completions, and how many of its characters they replace."""


def is_interactive() -> bool:
    """Whether someone is typing and can see the output."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def piped(stream: BinaryIO | None = None) -> Iterator[str]:
    """One message per line; a trailing backslash continues it on the next.

    Raises UserError for bytes that are not UTF-8.
    """
    stream, text = stream or sys.stdin.buffer, ""
    for place, data in enumerate(iter(stream.readline, b""), start=1):
        try:
            text += data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"line {place} of standard input is not UTF-8 (0x{data[error.start]:02x}); convert "
                "it, for example with iconv -t UTF-8"
            ) from error
        if goes_on(text):
            text = text[:-1] + "\n"
            continue
        yield text
        text = ""
    if text.strip():
        yield text


def dumb() -> str:
    """A message typed in a terminal without escape sequences; raises EOFError at the end."""
    try:
        text = input(PROMPT)
        while goes_on(text):
            text = text[:-1] + "\n" + input(MORE)
        return text
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)  # end the prompt's line
        raise


def editor(complete: Completions) -> Callable[[], str]:
    """A function that reads a message in the terminal, with history and completion.

    It raises EOFError for Ctrl-D on an empty line and KeyboardInterrupt for Ctrl-C on one.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    session = PromptSession(
        [("bold", PROMPT)],
        multiline=True,
        prompt_continuation=MORE,
        history=_history(cache_directory() / "chat_history"),
        completer=_completer(complete),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_open_in_editor=True,
        enable_suspend=True,
        key_bindings=_keys(),
        output=create_output(always_prefer_tty=True),
    )

    def read() -> str:
        while True:
            try:
                return session.prompt()
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    raise

    return read


@contextmanager
def unechoed() -> Iterator[None]:
    """Hide what is typed while the block runs: it would appear in the middle of an answer."""
    try:
        before = termios.tcgetattr(sys.stdin)
        now = [*before]
        now[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSANOW, now)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _keys():
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event):
        buffer = event.current_buffer
        if goes_on(buffer.document.text_before_cursor):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event):
        event.current_buffer.insert_text("\n")

    return keys


def _completer(complete: Completions):
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Words(Completer):
        def get_completions(self, document, event):
            before = document.text_before_cursor
            command, _, rest = before.partition(" ")
            if command[:1] == "/" and COMMANDS.get(command[1:], ("",))[0] == "FILE":
                yield from files.get_completions(Document(rest, len(rest)), event)
            else:
                words, replaced = complete(before)
                yield from (Completion(word, -replaced) for word in words)

    return Words()


def _history(path: Path):
    """The history of all chats; of this one only, if the file cannot be used."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string):
            try:
                super().store_string(string)
            except (OSError, ValueError):  # the disk is full, or the text is not UTF-8
                _log.debug("a message was not kept in %s", path, exc_info=True)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # private to the user
        if path.stat().st_size > MOST_HISTORY:
            old = path.read_text(encoding="utf-8", errors="replace")
            write_whole(path, old[old.index("\n# ", len(old) // 2) :], private=True)
    except (OSError, ValueError):
        _log.debug("no history in %s", path, exc_info=True)
        return InMemoryHistory()
    return Kept(path)
