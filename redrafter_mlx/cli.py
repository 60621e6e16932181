"""What all commands share: error lines, exit codes, Ctrl-C, log messages."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from redrafter_mlx.config import NOT_HONOURED
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import blas
from redrafter_mlx.machine.storage import NOT_WAITED_FOR, one_line

USAGE_ERROR = 2
INTERRUPTED = 130
called_as = ""
"""The name by which the user called the command, if it is not the module's own."""
ENGINE = "engine"
"""Name of an engine's thread: alive at exit only if it is still loading, which nothing stops."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints say what to do instead.

    Every command gets --debug. Abbreviated flags are not accepted: a new flag must not change
    what an old command line means.
    """

    def __init__(self, **kwargs):
        if called_as:
            *_, command = f" {kwargs.get('prog', '')}".rpartition(" ")
            kwargs["prog"] = called_as + (f" {command}" if command in ("inspect", "gguf") else "")
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show tracebacks and log details")

    def parse_args(self, args=None, namespace=None):
        flags, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            name = word.removeprefix("--").split("=")[0]
            if reason := NOT_HONOURED.get(name.replace("-", "_")):
                self.error(f"--{name} cannot be honoured: {reason}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; see --help")
        return flags

    def error(self, message: str):
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def run(main: Callable[[argparse.Namespace], int], parser: Parser, args=None) -> int:
    """Parse, set up logging, call `main`; the exit code.

    A mistake of the user's or a failure of the machine is one line on stderr and code 2; Ctrl-C is
    code 130. With --debug both come with a traceback.
    """
    flags = parser.parse_args(args)
    logging.basicConfig(
        format="%(message)s", level=logging.DEBUG if flags.debug else logging.WARNING
    )
    logging.getLogger("redrafter_mlx").setLevel(logging.DEBUG if flags.debug else logging.INFO)
    logging.getLogger("redrafter_mlx").debug("BLAS: %s", blas.preload())
    try:
        # MLX takes TMPDIR as it is, for its kernels; Python finds a directory that can be written.
        os.environ["TMPDIR"] = tempfile.gettempdir()
        return main(flags)
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except (UserError, ImportError, OSError, RuntimeError) as error:
        if flags.debug:
            raise
        print(f"{parser.prog}: error: {_told(error)}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        if flags.debug:
            raise
        print(f"{parser.prog}: interrupted", file=sys.stderr, flush=True)
        if any(thread.name in (NOT_WAITED_FOR, ENGINE) for thread in threading.enumerate()):
            os._exit(INTERRUPTED)
        return INTERRUPTED


def _told(error: Exception) -> str:
    """What was wrong and what to do about it, on one line."""
    if isinstance(error, UserError):
        return str(error)
    reason = one_line(error)
    if isinstance(error, ImportError):
        return _told_of_import(reason)
    if "[Compile::" in reason:
        return (
            f"{reason}; MLX makes kernels with g++ in {tempfile.gettempdir()}: make room there, or "
            "set TMPDIR to another directory"
        )
    return f"{reason}; --debug shows where"


def _told_of_import(reason: str) -> str:
    build = blas.cuda_build()
    if build and re.search(r"libcuda\.so|CUDA|cuda\w+\(", reason):
        return (
            f"{build} needs an NVIDIA GPU and its driver: {reason}; install the driver, or MLX for "
            f'the CPU: pip uninstall {build} && pip install --force-reinstall "mlx[cpu]"'
        )
    return (
        f"what is installed is not complete: {reason}; repeat README's pip install with "
        "--force-reinstall"
    )


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: Python keeps bytes that were not UTF-8 as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def json_object(text: str) -> dict[str, Any]:
    """A flag's type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as {{}}")
    return value


def true_or_false(text: str) -> bool:
    """A flag's type: True or False, as mlx_lm.generate writes it."""
    try:
        return {"true": True, "t": True, "false": False, "f": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None
