"""What a line means: a message, or a /command."""

from __future__ import annotations

from dataclasses import dataclass

from redrafter_mlx.errors import UserError

COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "begin another conversation; the system message and the settings stay"),
    "system": ("TEXT", "the system message from now on (none: no more); alone: show it"),
    "set": ("NAME VALUE", "change a setting; NAME alone shows it, alone: all of them"),
    "retry": ("", "another answer to the last message"),
    "undo": ("", "take back the last message and its answer"),
    "save": ("FILE", "write the conversation and the settings; alone: to the same file again"),
    "load": ("FILE", "go on with what was saved"),
    "stats": ("", "what the last answer and all of them cost"),
    "quit": ("", "leave, as Ctrl-D does"),
}
"""Name -> what follows it, and what it does."""

WITH_ARGUMENT = frozenset(name for name, (argument, _) in COMMANDS.items() if argument)

KEYS = (
    ("Enter", "sends; after a backslash it begins a new line, as Alt-Enter does"),
    ("Tab", "completes commands, settings and file names"),
    ("Up, Ctrl-R", "earlier messages, and a search in them"),
    ("Ctrl-C", "ends the answer, or wipes out the line"),
    ("//...", "a message that begins with a slash"),
)


@dataclass(frozen=True)
class Line:
    """What was typed: a message (command is None), or a command and what follows it."""

    command: str | None
    text: str


def parse(typed: str) -> Line:
    """What a line, or several of them, means.

    >>> parse("/set temp 0.7")
    Line(command='set', text='temp 0.7')
    >>> parse("//set is a command")
    Line(command=None, text='/set is a command')

    Raises UserError for a command that does not exist or takes nothing after it.
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
        raise UserError(f"/{name} takes nothing after it, not {_shortly(rest)!r}")
    return Line(name, rest)


def goes_on(text: str) -> bool:
    """Whether a backslash at the end says that another line follows; two are just text."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _shortly(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
