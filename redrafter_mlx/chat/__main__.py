"""Chat with a model: python -m redrafter_mlx.chat.

In a terminal, messages are typed in a line editor; from a pipe, each line is a message. Answers go
to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from redrafter_mlx import cli
from redrafter_mlx.chat.conversation import load
from redrafter_mlx.chat.screen import Screen, is_dumb
from redrafter_mlx.chat.settings import Settings
from redrafter_mlx.config import (
    ChatOptions,
    DrafterOptions,
    DraftOptions,
    EngineOptions,
    SamplingOptions,
    add_flags,
    from_flags,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.model_flags import add_end_tokens, add_model_flags, drafter_of, loading

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are reported before that
    from redrafter_mlx.chat.session import Chat
    from redrafter_mlx.engine.served import Served


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.chat",
        description="Chat with a model: faster with a drafter, and with the same words as "
        "without one. /help lists the commands that can be typed.",
    )
    add_model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    parser.add_argument(
        "--load",
        type=Path,
        metavar="FILE",
        help="continue a chat that /save wrote, settings included; flags that differ from their "
        "defaults take precedence",
    )
    add_flags(parser, ChatOptions, SamplingOptions, DraftOptions, DrafterOptions, EngineOptions)
    return parser


def command(flags: Namespace) -> int:
    """Chat until the input ends; returns the exit code."""
    settings = Settings.from_flags(flags)
    drafter = drafter_of(flags)
    if not cli.is_text(flags.system or ""):
        raise UserError("--system is not UTF-8; convert it, for example with iconv -t UTF-8")
    if flags.load:  # a bad file is reported before a model is loaded
        settings.with_all(load(flags.load)[2])

    from redrafter_mlx.chat import terminal
    from redrafter_mlx.engine.engine import Engine

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character it cannot encode must not end the chat
            stream.reconfigure(errors="replace")
    screen, interactive = Screen(), terminal.is_interactive()
    with screen.notes_log():
        if interactive:
            screen.note(f"loading {flags.model}")
        engine = Engine(lambda: _served(flags, *drafter), from_flags(EngineOptions, flags))
        with terminal.unechoed():
            engine.start()
        try:
            chat = _chat(engine, screen, flags, settings)
            if interactive:
                screen.note("/help lists commands and keys, Ctrl-D leaves", gap=True)
                chat.talk(terminal.dumb if is_dumb() else terminal.editor(chat.complete))
            else:
                chat.answer_all(terminal.piped())
        finally:
            engine.stop()
    return 0


def _served(flags: Namespace, drafter: str | None, options: DrafterOptions) -> Served:
    """Load the model and its drafter; runs in the engine's thread."""
    from redrafter_mlx.engine.served import load_served

    served = load_served(flags.model, drafter, options, **loading(flags))
    add_end_tokens(served.tokenizer, flags.extra_eos_token)
    if not served.tokenizer.has_chat_template:
        for name in ("system", "chat_template_config"):
            if getattr(flags, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} needs a chat template: use a model that has one")
    return served


def _chat(engine, screen: Screen, flags: Namespace, settings: Settings) -> Chat:
    from redrafter_mlx.chat.answers import Asker
    from redrafter_mlx.chat.session import Chat

    asker = Asker(engine, screen, flags.chat_template_config)
    chat = Chat(asker, screen, flags.model, settings)
    if flags.load:
        chat.open(flags.load)
        chat.settings = chat.settings.with_all(settings.changed())
    if flags.system is not None:
        chat.conversation.system = flags.system
    return chat


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(command, make_parser(), args)


if __name__ == "__main__":
    sys.exit(main())
