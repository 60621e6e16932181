"""Generate text from a prompt: python -m redrafter_mlx.generate --prompt "...".

The text goes to standard output; progress, notes and statistics go to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from redrafter_mlx import cli
from redrafter_mlx.config import (
    DrafterOptions,
    DraftOptions,
    GenerationOptions,
    SamplingOptions,
    add_flags,
    from_flags,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.model_flags import (
    PromptProgress,
    add_end_tokens,
    add_model_flags,
    drafter_of,
    loading,
)

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are told before that
    from redrafter_mlx.check import Comparison
    from redrafter_mlx.generation import Generation
    from redrafter_mlx.stream import GenerationResponse

QUERY = "<query>"
"""Stands in for the message, to find its place in the chat template's text."""
_log = logging.getLogger("redrafter_mlx")


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.generate",
        description="Generate text: faster with a drafter, and with the same words as without.",
    )
    flag = parser.add_argument
    add_model_flags(parser)
    flag("--prompt", "-p", required=True, help="the message; - reads it from standard input")
    flag("--system-prompt", help="system message for the chat template")
    flag("--prefill-response", help="how the answer begins")
    flag(
        "--prompt-cache-file",
        metavar="FILE",
        help="file written by mlx_lm.cache_prompt: the message follows the text in it",
    )
    flag(
        "--truncate-prompt",
        action="store_true",
        help="leave out the middle of a prompt that is longer than the model's context "
        "(default: refuse it)",
    )
    flag("--ignore-chat-template", action="store_true", help="continue the prompt as it is")
    flag("--check", action="store_true", help="replay with plain decoding and compare")
    flag("--json", action="store_true", help="print one JSON object: text, tokens, statistics")
    flag(
        "--verbose",
        type=cli.true_or_false,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="True: all statistics, False: none (default: one line)",
    )
    add_flags(parser, GenerationOptions, SamplingOptions, DraftOptions, DrafterOptions)
    return parser


def command(flags: Namespace) -> int:
    """Run one generation as the flags say; the exit code."""
    options = {
        "generation": from_flags(GenerationOptions, flags),
        "sampling": from_flags(SamplingOptions, flags),
        "draft": from_flags(DraftOptions, flags),
    }
    drafter_name, drafter_options = drafter_of(flags)
    rule, temp = flags.rule, flags.temp
    if flags.check and rule != "match" and temp > 0:
        raise UserError(
            f"--check compares texts, and --rule {rule} does not keep the text at --temp {temp:g}: "
            "leave one out"
        )
    message = _read_message(flags.prompt)
    saved = _load_prompt_cache(flags.prompt_cache_file, flags.model)

    from redrafter_mlx import check, generation, stream
    from redrafter_mlx.loading import context, drafters, hub

    model, tokenizer = hub.load(flags.model, **loading(flags))
    prompt = _encode(tokenizer, message, flags)
    whole, positions = len(prompt), context.known_positions(model)
    prompt = context.fitting(prompt, positions, flags.truncate_prompt)
    if len(prompt) < whole:
        _log.warning("%d tokens in the middle of the prompt are left out", whole - len(prompt))
    drafter = None
    if drafter_name:
        is_wanted = bool(flags.drafter)
        drafter = drafters.load_if_possible(
            drafter_name, model, tokenizer, drafter_options, is_wanted
        )
    options["eos_token_ids"] = tokenizer.eos_token_ids
    run = generation.Generation(
        model, prompt, drafter, progress=PromptProgress(), prompt_cache=saved, **options
    )
    printed = _Printed(quiet=flags.json)
    interrupted = printed.consume(stream.text_events(run, tokenizer))
    if drafter_options.max_gram_memory:
        drafter.save()
    comparison = None
    if flags.check and not interrupted:
        options["sampling"] = dataclasses.replace(options["sampling"], seed=run.seed)
        saved = _load_prompt_cache(flags.prompt_cache_file, flags.model)
        plain = generation.Generation(model, prompt, None, prompt_cache=saved, **options)
        comparison = check.compare_with_plain(printed.tokens, plain)
    if flags.json:
        used = drafter_name if drafter else None
        print(json.dumps(_as_json(flags.model, used, run, printed, comparison), ensure_ascii=False))
    else:
        _report(flags.verbose, run, comparison)
    return cli.INTERRUPTED if interrupted else 0


def _read_message(prompt: str) -> str:
    if prompt != "-":
        if not cli.is_text(prompt):
            raise UserError("--prompt is not UTF-8; convert it, for example with iconv -t UTF-8")
        return prompt.replace("\\n", "\n").replace("\\t", "\t")  # as mlx_lm.generate does
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: standard input is not UTF-8 (byte {error.start} is "
            f"0x{data[error.start]:02x}); convert it, for example with iconv -t UTF-8"
        ) from error


def _load_prompt_cache(path: str | None, model: str) -> list | None:
    """The caches in a file of mlx_lm.cache_prompt; UserError if it is not one of this model's."""
    if path is None:
        return None
    from mlx_lm.models.cache import load_prompt_cache

    try:
        cache, about = load_prompt_cache(path, return_metadata=True)
    except Exception as error:  # whatever mlx and mlx-lm raise on arbitrary bytes
        raise UserError(
            f"--prompt-cache-file {path} is not a prompt cache: {one_line(error)}"
        ) from error
    made_with = about.get("model", model) if isinstance(about, dict) else model
    if made_with != model:
        raise UserError(f"{path} was made with {made_with}: give --model {made_with}")
    return cache


def _encode(tokenizer: Any, message: str, flags: Namespace) -> list[int]:
    """Token ids of the message in the tokenizer's chat template, if it has one and may use it."""
    add_end_tokens(tokenizer, flags.extra_eos_token)
    if flags.ignore_chat_template or not tokenizer.has_chat_template:
        for name in ("system_prompt", "prefill_response", "chat_template_config"):
            if getattr(flags, name):
                raise UserError(
                    f"--{name.replace('_', '-')} needs a chat template: "
                    "drop --ignore-chat-template or take a model that has one"
                )
        return tokenizer.encode(message)
    messages = [{"role": "system", "content": flags.system_prompt}] if flags.system_prompt else []
    messages.append({"role": "user", "content": message})
    begun = flags.prefill_response is not None
    if begun:
        messages.append({"role": "assistant", "content": flags.prefill_response})
    arguments = {"continue_final_message": begun, "add_generation_prompt": not begun}
    template = lambda: tokenizer.apply_chat_template(
        messages, tokenize=False, **arguments, **flags.chat_template_config
    )
    try:
        text = template()
        if flags.prompt_cache_file:  # what stands before the message is in the cache
            messages[-1 - begun]["content"] = QUERY
            text = text[template().index(QUERY) :]
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template of {flags.model} failed: {one_line(error)}") from error
    return tokenizer.encode(text, add_special_tokens=False)


class _Printed:
    """The text and tokens of a run as they come; printed round by round unless quiet."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def consume(self, events: Iterable[GenerationResponse]) -> bool:
        """Take all events; whether Ctrl-C ended the text early."""
        try:
            for event in events:
                self.text += event.text
                self.tokens.append(event.token)
                self.finish_reason = event.finish_reason
                if not self._quiet:
                    print(event.text, end="", flush=event.end_of_round)
        except KeyboardInterrupt:
            self.finish_reason = "interrupted"
        if not self._quiet:
            print(flush=True)
        return self.finish_reason == "interrupted"


def _report(verbose: bool | None, run: Generation, comparison: Comparison | None) -> None:
    if verbose is not False:
        report = run.stats.report() if verbose else run.stats.summary()
        seed = "" if run.seed is None else f", seed {run.seed}"
        print(f"{'=' * 10}\n{report}{seed}", file=sys.stderr)
        if run.note:
            print(run.note, file=sys.stderr)
    if comparison is not None:
        print(f"check: {comparison}", file=sys.stderr)


def _as_json(
    model: str,
    drafter: str | None,
    run: Generation,
    printed: _Printed,
    comparison: Comparison | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "drafter": drafter,
        "text": printed.text,
        "tokens": printed.tokens,
        "finish_reason": printed.finish_reason,
        "seed": run.seed,
        **run.stats.as_dict(),
        **({} if comparison is None else {"check": comparison.as_dict()}),
    }


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(command, make_parser(), args)


class _CallableModule(ModuleType):
    """Keeps `redrafter_mlx.generate(...)` callable where this module has been imported."""

    def __call__(self, *args, **kwargs) -> str:
        from redrafter_mlx import stream

        return stream.generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
