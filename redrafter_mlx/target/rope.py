"""Rotary positions for rows that are not consecutive.

`mx.fast.rope` takes one offset for each batch entry, not for each row. So the rows of a tree are
folded into the batch: (1, H, T, D) becomes (T, H, 1, D), each with its own offset, and back.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def takes_offset(module: nn.Module) -> bool:
    """Whether a module turns positions into rotations: its call has an `offset` parameter."""
    return _call_takes_offset(type(module))


@cache
def _call_takes_offset(cls: type) -> bool:
    if not issubclass(cls, Callable):
        return False
    names = inspect.signature(cls.__call__).parameters
    return "offset" in names and "cache" not in names


def accept_row_offsets(module: nn.Module) -> None:
    """Let one rope module take an offset (T,) for (1, H, T, D): one position for each row.

    Modules that compute with the offset as a Python number also get to take one for each batch
    entry, (B,) for (B, H, T, D), as the others do.

    Only the module's class changes, to a subclass that passes all other calls on, so parameters,
    names and isinstance stay as they were.
    """
    module.__class__ = _folding(type(module))


@cache
def _folding(cls: type) -> type:
    if getattr(cls, "folds_rows", False):
        return cls

    class Folding(cls):
        folds_rows = True

        def __call__(self, x: mx.array, offset: Any = 0, *args, **kwargs):
            rotate = lambda x, offset: super(Folding, self).__call__(x, offset, *args, **kwargs)
            return rotate_rows(rotate, x, offset)

    Folding.__name__ = Folding.__qualname__ = cls.__name__
    return Folding


def rotate_rows(rotate: Callable, x: mx.array, offset: Any) -> mx.array:
    """rotate(x, offset), where x (1, H, T, D) may also have an offset (T,), one for each row."""
    if _one_per_row(x, offset):
        rows = x.swapaxes(0, -2)  # (T, H, 1, D)
        return _one_by_one(rotate, rows, offset).swapaxes(0, -2)
    if isinstance(offset, mx.array) and offset.size > 1:
        return _one_by_one(rotate, x, offset)
    return rotate(x, offset)


def _one_by_one(rotate: Callable, x: mx.array, offset: mx.array) -> mx.array:
    """Rotate (B, H, T, D) at offsets (B,): all at once if the module can."""
    try:
        return rotate(x, offset)
    except (TypeError, ValueError):  # computes with the offset as a Python number
        return mx.concatenate([rotate(x[i : i + 1], at) for i, at in enumerate(offset.tolist())])


def accept_row_scales(model: nn.Module) -> None:
    """The same for mlx-lm's one other use of positions: Mistral's attention scale.

    Its function builds (B, 1, T, 1) factors from one offset for each batch entry. Asked for one
    row at each of T positions it gives (T, 1, 1, 1), which is turned into (1, 1, T, 1).
    """
    for file in {sys.modules[type(module).__module__] for module in model.modules()}:
        scale = getattr(file, _SCALE, None)
        if scale is not None and not hasattr(scale, "__wrapped__"):
            setattr(file, _SCALE, _one_scale_per_row(scale))


_SCALE = "_get_llama_4_attn_scale"


def _one_scale_per_row(scale: Callable) -> Callable:
    @wraps(scale)
    def wrapper(size: int, offset: Any, *args, **kwargs):
        if isinstance(offset, mx.array) and offset.size == size > 1:
            return scale(1, offset, *args, **kwargs).swapaxes(0, 2)
        return scale(size, offset, *args, **kwargs)

    return wrapper


def _one_per_row(x: mx.array, offset: Any) -> bool:
    return (
        isinstance(offset, mx.array)
        and offset.ndim == 1
        and offset.size > 1
        and x.shape[0] == 1
        and x.shape[-2] == offset.size
    )
