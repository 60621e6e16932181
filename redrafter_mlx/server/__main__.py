"""Serve a model: python -m redrafter_mlx.server --model ... .

OpenAI's and Anthropic's requests, and a page for people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import os
import sys
from argparse import Namespace

from redrafter_mlx import cli
from redrafter_mlx.config import (
    DrafterOptions,
    DraftOptions,
    EngineOptions,
    SamplingOptions,
    add_flags,
    flag_name,
    from_flags,
)
from redrafter_mlx.drafters.spec import AUTO, parse
from redrafter_mlx.errors import UserError
from redrafter_mlx.server.options import AnswerOptions, ServerOptions

DEMO = "demo"
KEY_VARIABLE = "REDRAFTER_MLX_API_KEY"
_log = logging.getLogger("redrafter_mlx")


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py and options.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.server",
        description="Answer OpenAI's and Anthropic's requests over HTTP, with a page at /. The "
        "options of sampling and drafting are what holds where a request says nothing.",
    )
    flag = parser.add_argument
    flag(
        "--model",
        default=DEMO,
        help="demo, gemma-demo, a model directory, .gguf file or Hugging Face repo",
    )
    flag("--drafter", help="as of redrafter_mlx.generate (default: auto)")
    flag("--no-draft", action="store_true", help="plain decoding")
    flag("--adapter-path", help="a LoRA adapter for the target")
    flag("--revision", help="branch, tag or commit of the model's Hugging Face repo")
    flag("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    flag(
        "--allow-model-switch",
        nargs="*",
        metavar="MODEL",
        help="let requests change to these models (without a name: to any Hugging Face repo)",
    )
    groups = (ServerOptions, AnswerOptions, SamplingOptions, DraftOptions, DrafterOptions)
    add_flags(parser, *groups, EngineOptions)
    parser.set_defaults(api_key=[])  # argparse appends to lists only
    return parser


def command(flags: Namespace) -> int:
    """Serve until a signal ends it; the exit code."""
    missing = [name for name in ("pydantic", "starlette", "uvicorn") if not _is_there(name)]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed; the server needs "
            "pip install 'redrafter-mlx[server]'"
        )
    if os.environ.get(KEY_VARIABLE):
        flags.api_key = [*flags.api_key, os.environ[KEY_VARIABLE]]
    options = from_flags(ServerOptions, flags)
    drafter = _drafter(flags)
    if not (options.is_local or options.api_key):
        _log.warning("everybody who reaches %s may ask: give --api-key", options.host)
    from redrafter_mlx.server.plan import Defaults

    defaults = Defaults(
        from_flags(AnswerOptions, flags),
        from_flags(SamplingOptions, flags),
        from_flags(DraftOptions, flags),
        options.context,
    )
    from redrafter_mlx.engine import Engine, load_served
    from redrafter_mlx.server.serving import bind, serve

    engine_options = from_flags(EngineOptions, flags)
    drafter_options = from_flags(DrafterOptions, flags)
    listed = flags.allow_model_switch

    def make(name: str) -> Engine:
        is_first = name == flags.model
        trust = flags.trust_remote_code and (is_first or name in (listed or ()))
        return Engine(
            lambda: load_served(
                name,
                drafter if is_first else (drafter and AUTO),
                drafter_options if is_first else None,
                adapter_path=flags.adapter_path if is_first else None,
                revision=flags.revision if is_first else None,
                tokenizer_config={"trust_remote_code": trust},
                trust_remote_code=trust,
            ),
            engine_options,
        )

    with bind(options) as listening:  # before the model is loaded: a port in use is told at once
        engine = make(flags.model).start()
        told = f"{flags.model} with drafter {drafter}" if drafter else f"{flags.model}, no drafter"
        return asyncio.run(serve(listening, engine, make, listed, defaults, options, told))


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _drafter(flags: Namespace) -> str | None:
    """The drafter's name, None for none; UserError for flags that contradict each other."""
    if flags.no_draft and flags.drafter:
        raise UserError(f"--no-draft contradicts --drafter {flags.drafter}: leave one out")
    options = from_flags(DrafterOptions, flags)
    if flags.no_draft:
        for f in dataclasses.fields(options):
            if getattr(options, f.name) != f.default:
                raise UserError(f"{flag_name(f)} has no use without a drafter: leave it out")
        return None
    name = flags.drafter or AUTO
    parse(name, options)
    return name


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(command, make_parser(), args)


if __name__ == "__main__":
    sys.exit(main())
