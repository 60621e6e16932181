"""Lossless speculative decoding with recurrent draft heads on MLX and mlx-lm."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from redrafter_mlx.machine import blas

try:
    blas.preload()  # must come before anything imports mlx
except KeyboardInterrupt:
    # The first preload on a machine takes seconds. Only our commands (started by `python -m` or by
    # a script) answer Ctrl-C themselves.
    command = os.path.basename(sys.argv[0]) if sys.argv else ""
    if command != "-m" and not command.startswith(("redrafter_mlx.", "redrafter-mlx")):
        raise
    print("interrupted", file=sys.stderr)
    sys.exit(130)

_PUBLIC = {
    "load": "loading.hub",
    "load_drafter": "loading.drafters",
    "generate": "stream",
    "stream_generate": "stream",
    "GenerationResponse": "stream",
    "UserError": "errors",
}
__all__ = [
    "GenerationResponse",
    "UserError",
    "generate",
    "load",
    "load_drafter",
    "stream_generate",
]

if TYPE_CHECKING:
    from redrafter_mlx.errors import UserError
    from redrafter_mlx.loading.drafters import load_drafter
    from redrafter_mlx.loading.hub import load
    from redrafter_mlx.stream import GenerationResponse, generate, stream_generate


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` need not wait for mlx, and the commands keep their names."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
