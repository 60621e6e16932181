"""What the commands that answer people share: which model, which drafter, how a prompt is read.

Nothing here imports mlx, which takes a second: wrong flags are told before that.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from redrafter_mlx import cli
from redrafter_mlx.config import DrafterOptions, flag_name, from_flags
from redrafter_mlx.drafters.spec import AUTO, parse
from redrafter_mlx.errors import UserError

DEMO = "demo"
OUR_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "messages",
    "tokenize",
    "tools",
)
"""Arguments of a chat template that are not the user's to give."""


def add_target_flags(parser: ArgumentParser) -> None:
    """The flags that say which target is loaded; see `loading`."""
    flag = parser.add_argument
    flag(
        "--model",
        default=DEMO,
        help="demo, gemma-demo, a model directory, .gguf file or Hugging Face repo",
    )
    flag("--adapter-path", help="a LoRA adapter for the target")
    flag("--revision", help="branch, tag or commit of the model's Hugging Face repo")
    flag("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")


def add_model_flags(parser: ArgumentParser) -> None:
    """The flags that say which target answers, and what drafts for it."""
    add_target_flags(parser)
    flag = parser.add_argument
    flag(
        "--drafter",
        help="a trained head (demo, a directory or Hugging Face repo: recurrent, medusa, eagle3, "
        "mtp or dflash, also as KIND:NAME), max_gram, model:NAME, cascade:[A,B,...], "
        "union:[A,B,...] or auto (default: auto, that is max_gram, united with the target's own "
        "head if it has one)",
    )
    flag("--no-draft", action="store_true", help="plain decoding")
    flag(
        "--chat-template-config",
        type=_template_arguments,
        default={},
        metavar="JSON",
        help="more arguments for the chat template",
    )
    flag(
        "--extra-eos-token",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="more tokens that end the text",
    )


def _template_arguments(text: str) -> dict[str, Any]:
    """A flag's type: arguments of a chat template that the commands do not give themselves."""
    config = cli.json_object(text)
    if taken := config.keys() & set(OUR_ARGUMENTS):
        raise ArgumentTypeError(f"it cannot set {sorted(taken)[0]}: leave it out")
    return config


def drafter_of(flags: Namespace) -> tuple[str | None, DrafterOptions]:
    """The drafter that was asked for, or auto, or None for plain decoding; and its options.

    Raises UserError if they are wrong, before anything is loaded.
    """
    if flags.no_draft and flags.drafter:
        raise UserError(f"--no-draft contradicts --drafter {flags.drafter}: leave one out")
    name = None if flags.no_draft else flags.drafter or AUTO
    options = from_flags(DrafterOptions, flags)
    if name is None:
        for f in dataclasses.fields(options):
            if getattr(options, f.name) != f.default:
                raise UserError(f"{flag_name(f)} has no use without a drafter: leave it out")
    else:
        parse(name, options)
    return name, options


def loading(flags: Any) -> dict[str, Any]:
    """What `hub.load` needs to know besides the model's name, of `add_target_flags`."""
    return {
        "adapter_path": flags.adapter_path,
        "revision": flags.revision,
        "tokenizer_config": {"trust_remote_code": flags.trust_remote_code},
        "trust_remote_code": flags.trust_remote_code,
    }


def encode_message(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message, in the tokenizer's chat template if it has one."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return list(tokenizer.encode(text))


def add_end_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let more tokens end a text; UserError for one that the tokenizer does not have."""
    for token in tokens:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise UserError(f"--extra-eos-token: {error}") from error


class PromptProgress:
    """A bar on the terminal while a long prompt is processed."""

    def __init__(self):
        self._bar = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            hidden = not sys.stderr.isatty() or total < 1024
            self._bar = tqdm(total=total, desc="prompt", unit="tok", leave=False, disable=hidden)
        self._bar.update(done - self._bar.n)
        if done >= total - 1:
            self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
