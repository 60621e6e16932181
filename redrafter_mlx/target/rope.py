"""Rotary positions for rows that are not consecutive.

`mx.fast.rope` takes one offset for each batch entry, not for each row. So the rows of a tree are
folded into the batch: (1, H, T, D) becomes (T, H, 1, D), each with its own offset, and back.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def takes_offset(module: nn.Module) -> bool:
    """Whether a module turns positions into rotations: its call has an `offset` parameter."""
    return _call_takes_offset(type(module))


@lru_cache(maxsize=None)
def _call_takes_offset(cls: type) -> bool:
    call = getattr(cls, "__call__", None)
    try:
        names = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False
    return "offset" in names and len(names) <= 5 and "cache" not in names


def accept_row_offsets(module: nn.Module) -> None:
    """Let one rope module take an offset (T,) for (1, H, T, D): one position for each row.

    Only the module's class changes, to a subclass of its own that passes every other call on, so
    parameters, names and isinstance stay as they were.
    """
    module.__class__ = _folding(type(module))


@lru_cache(maxsize=None)
def _folding(cls: type) -> type:
    if getattr(cls, "folds_rows", False):
        return cls

    class Folding(cls):
        folds_rows = True

        def __call__(self, x: mx.array, offset: Any = 0, *args, **kwargs):
            if not _one_per_row(x, offset):
                return super().__call__(x, offset, *args, **kwargs)
            rows = x.swapaxes(0, -2)  # (T, H, 1, D)
            return super().__call__(rows, offset, *args, **kwargs).swapaxes(0, -2)

    Folding.__name__ = Folding.__qualname__ = cls.__name__
    return Folding


def _one_per_row(x: mx.array, offset: Any) -> bool:
    return (
        isinstance(offset, mx.array)
        and offset.ndim == 1
        and offset.size > 1
        and x.shape[0] == 1
        and x.shape[-2] == offset.size
    )
