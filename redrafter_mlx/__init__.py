"""Lossless speculative decoding with recurrent draft heads on MLX and mlx-lm."""

import importlib
from typing import Any

from redrafter_mlx import blas

blas.preload()  # must come before anything imports mlx

_PUBLIC = {
    "load": "hub",
    "load_drafter": "hub",
    "generate": "stream",
    "stream_generate": "stream",
    "GenerationResponse": "stream",
    "UserError": "errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` need not wait for mlx, and the commands keep their names."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
