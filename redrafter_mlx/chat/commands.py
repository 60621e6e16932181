"""What a line means: a message, or a /command."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter_mlx.errors import UserError

COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "start a new conversation; the system message and the settings stay"),
    "system": ("TEXT", "set the system message (none: remove it); without TEXT: show it"),
    "set": ("NAME VALUE", "change a setting; without VALUE: show it; without NAME: show all"),
    "retry": ("", "ask for another answer to the last message"),
    "undo": ("", "take back the last message and its answer"),
    "save": ("FILE", "save conversation and settings; without FILE: to the same file again"),
    "load": ("FILE", "continue a saved conversation"),
    "stats": ("", "show what the last answer, and all of them, cost"),
    "quit": ("", "leave, as Ctrl-D does"),
}
"""Name -> its argument, and what it does."""

WITH_ARGUMENT = frozenset(name for name, (argument, _) in COMMANDS.items() if argument)

KEYS = (
    ("Enter", "sends the message; after a backslash it starts a new line, as Alt-Enter does"),
    ("Tab", "completes commands, settings and file names"),
    ("Up, Ctrl-R", "recall earlier messages, and search them"),
    ("Ctrl-C", "stops the answer, or clears the line"),
    ("//...", "sends a message that begins with one slash"),
)


@dataclass(frozen=True)
class Line:
    """What was typed: a message (command is None), or a command and its argument."""

    command: str | None
    text: str


def parse(typed: str) -> Line:
    """What was typed, taken apart; it may have several lines.

    >>> parse("/set temp 0.7")
    Line(command='set', text='temp 0.7')
    >>> parse("//set is a command")
    Line(command=None, text='/set is a command')

    Raises UserError for an unknown command, and for an argument to a command that takes none.
    """
    if not typed.startswith("/"):
        return Line(None, typed)
    if typed.startswith("//"):
        return Line(None, typed[1:])
    word = typed[1:].split(maxsplit=1)[0] if typed[1:].strip() else ""
    name, rest = word.lower(), typed[1:].strip()[len(word) :].strip()
    if name not in COMMANDS or typed[1:2].isspace():
        known = " ".join(f"/{name}" for name in COMMANDS)
        raise UserError(f"there is no /{_shortly(word)}; there are {known}; // sends a slash")
    if rest and name not in WITH_ARGUMENT:
        raise UserError(f"/{name} takes no argument, not even {_shortly(rest)!r}")
    return Line(name, rest)


def goes_on(text: str) -> bool:
    """Whether a trailing backslash announces another line; a pair of them is just text."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _shortly(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
