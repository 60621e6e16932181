"""Serve a model: python -m redrafter_mlx.server --model ... .

OpenAI's and Anthropic's requests, and a page for people.
"""

from __future__ import annotations

import asyncio
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
    from_flags,
)
from redrafter_mlx.drafters.spec import AUTO
from redrafter_mlx.errors import UserError
from redrafter_mlx.model_flags import add_end_tokens, add_model_flags, drafter_of, loading
from redrafter_mlx.server.options import AnswerOptions, ServerOptions

KEY_VARIABLE = "REDRAFTER_MLX_API_KEY"
_log = logging.getLogger("redrafter_mlx")


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py and options.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.server",
        description="Answer OpenAI's and Anthropic's requests over HTTP, with a page at /. The "
        "sampling and drafting options are the defaults for what a request leaves out.",
    )
    add_model_flags(parser)
    flag = parser.add_argument
    flag(
        "--allow-model-switch",
        nargs="*",
        metavar="MODEL",
        help="let requests switch to these models (without a name: to any Hugging Face repo)",
    )
    groups = (ServerOptions, AnswerOptions, SamplingOptions, DraftOptions, DrafterOptions)
    add_flags(parser, *groups, EngineOptions)
    parser.set_defaults(api_key=[])  # argparse can only append to a list
    return parser


def command(flags: Namespace) -> int:
    """Serve until a signal stops it; returns the exit code."""
    needed = ("pydantic", "starlette", "uvicorn")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} is not installed; the server needs "
            "pip install 'redrafter-mlx[server]'"
        )
    if os.environ.get(KEY_VARIABLE):
        flags.api_key = [*flags.api_key, os.environ[KEY_VARIABLE]]
    options = from_flags(ServerOptions, flags)
    drafter, drafter_options = drafter_of(flags)
    if not (options.is_local or options.api_key):
        _log.warning("anyone who can reach %s may send requests: give --api-key", options.host)
    from redrafter_mlx.server.plan import Defaults

    defaults = Defaults(
        from_flags(AnswerOptions, flags),
        from_flags(SamplingOptions, flags),
        from_flags(DraftOptions, flags),
        flags.chat_template_config,
    )
    from redrafter_mlx.engine import Engine, Served, load_served
    from redrafter_mlx.server.serving import bind, serve

    engine_options = from_flags(EngineOptions, flags)
    listed = flags.allow_model_switch

    def load(name: str) -> Served:
        if name == flags.model:
            served = load_served(name, drafter, drafter_options, **loading(flags))
        else:  # the flags describe the first model and need not fit another
            trust = flags.trust_remote_code and name in (listed or ())
            config = {"trust_remote_code": trust}
            auto = drafter and AUTO
            served = load_served(name, auto, tokenizer_config=config, trust_remote_code=trust)
        served.context = options.context or served.context
        add_end_tokens(served.tokenizer, flags.extra_eos_token)
        if flags.chat_template_config and not served.tokenizer.has_chat_template:
            raise UserError(f"--chat-template-config: {name} has no chat template")
        return served

    def make(name: str) -> Engine:
        return Engine(lambda: load(name), engine_options)

    with bind(options) as listening:  # before the model is loaded: a port in use is an error now
        engine = make(flags.model).start()
        with_drafter = f" with drafter {drafter}" if drafter else ", no drafter"
        described = f"{flags.model}{with_drafter}"
        return asyncio.run(serve(listening, engine, make, listed, defaults, options, described))


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(command, make_parser(), args)


if __name__ == "__main__":
    sys.exit(main())
