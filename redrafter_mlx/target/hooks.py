"""Lets the convolutions and recurrences of mlx-lm's layers run along the paths of a tree.

Functions are replaced in mlx-lm's modules, for all models; methods in the classes of a loaded
model's modules. Outside our passes, and where all rows will be kept (a prompt, one row), each does
what it did before. What many models share is here; what one family alone has is a file in layers/.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, ssm

from redrafter_mlx.errors import UserError
from redrafter_mlx.target import layers
from redrafter_mlx.target.recurrence import decayed_sum, delta_rule
from redrafter_mlx.target.state import in_flight, reading

Hook = Callable[..., object]
"""Called in place of a stock function, with that and its arguments, when rows may be rejected."""


def install(model: nn.Module) -> None:
    """Hook the functions and methods that the model's recurrent layers call.

    Raises UserError, with the name, if mlx-lm has changed the parameters of one.
    """
    for file, functions in ((gated_delta, _GATED_DELTA), (ssm, _SSM)):
        for name, (hook, takes) in functions.items():
            _replace(file, name, hook, takes)
    for file in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name, (hook, takes) in layers.FUNCTIONS.get(file.__name__, {}).items():
            _replace(file, name, hook, takes)
    for module in model.modules():
        methods = _methods(module)
        if methods:
            module.__class__ = _changed(type(module), tuple(methods.items()))


def _methods(module: nn.Module) -> Mapping[str, tuple[Hook, Sequence[str]]]:
    if hasattr(type(module), "_stock"):
        return {}
    if isinstance(module, nn.Conv1d) and module.weight.shape[-1] == 1:
        return {"__call__": (_depthwise, ("self", "x"))}
    return layers.METHODS.get(f"{type(module).__module__}.{type(module).__name__}", {})


@cache
def _changed(cls: type, methods: tuple) -> type:
    """A subclass whose `methods` are hooked; names and isinstance stay as they were."""

    def hooked(stock: Callable, hook: Hook) -> Callable:
        @wraps(stock)
        def method(self, *args, **kwargs):
            if in_flight() is None:
                return stock(self, *args, **kwargs)
            return hook(stock, self, *args, **kwargs)

        return method

    members: dict[str, object] = {"_stock": cls}
    for name, (hook, takes) in methods:
        stock = getattr(cls, name, None)
        _check(f"{cls.__module__}.{cls.__name__}.{name}", stock, takes)
        members[name] = hooked(stock, hook)
    changed = type(cls)(cls.__name__, (cls,), members)
    changed.__qualname__, changed.__module__ = cls.__qualname__, cls.__module__
    return changed


def _replace(file: ModuleType, name: str, hook: Hook, takes: Sequence[str]) -> None:
    """Put a hook in place of a function of a module, once."""
    stock = getattr(file, name, None)
    if hasattr(stock, "_stock"):
        return
    _check(f"{file.__name__}.{name}", stock, takes)

    @wraps(stock)
    def hooked(*args, **kwargs):
        if in_flight() is None:
            return stock(*args, **kwargs)
        return hook(stock, *args, **kwargs)

    hooked._stock = stock
    setattr(file, name, hooked)


def _check(name: str, function: Callable | None, takes: Sequence[str]) -> None:
    found = None if function is None else list(inspect.signature(function).parameters)
    if found is None or found[: len(takes)] != list(takes):
        now = "is gone" if found is None else f"takes ({', '.join(found)})"
        raise UserError(
            f"in this version of mlx-lm {name} {now}, but ({', '.join(takes)}) was expected, so "
            "its layers cannot verify a tree; generate with --no-draft"
        )


def _depthwise(stock, self, x):
    """A causal convolution per channel over x (1, K - 1 + N, C), rows before the pass first."""
    held, size = reading(), self.weight.shape[1]
    held.keep_window(x, size)
    if held.lineage.is_chain:
        return stock(self, x)
    return stock(self, x[0][held.lineage.windows(size)]).swapaxes(0, 1)


def _gated_delta(stock, q, k, v, g, beta, state=None, mask=None):
    cache = reading()
    if state is None:
        state = mx.zeros((1, *v.shape[2:], k.shape[-1]), mx.float32)
    is_kernel = stock.__name__ == "gated_delta_kernel"
    if is_kernel and cache.lineage.is_chain:  # rows one after the other in one launch
        y, new = stock(q, k, v, g, beta, state, mask)

        def after(row: int) -> mx.array:
            return stock(*(x[:, : row + 1] for x in (q, k, v, g, beta)), state, None)[1]

        return y, cache.keep_state(new, after)
    y, after = delta_rule(q, k, v, g, beta, state, cache.lineage)
    return y, cache.keep_state(after(len(cache.lineage) - 1), after)


_DELTA = (_gated_delta, ("q", "k", "v", "g", "beta", "state", "mask"))
_GATED_DELTA = {"gated_delta_ops": _DELTA, "gated_delta_kernel": _DELTA}


def _ssm_attn(
    stock, x, A_log, B, C, D, dt, dt_bias, state=None, time_step_limit=(0.001, 100.0), mask=None,
    lengths=None, step=256,
):  # fmt: skip
    cache = reading()
    _, rows, heads, size = x.shape
    dt = ssm.compute_dt(dt, dt_bias, time_step_limit)[0]  # (N, H)
    log_decay = dt * -mx.exp(A_log).astype(dt.dtype)
    by_head = lambda y: mx.repeat(y[0].swapaxes(0, 1), heads // y.shape[2], axis=0)
    if state is None:
        state = mx.zeros((1, heads, size, B.shape[-1]), dt.dtype)
    values = (dt[..., None] * x[0]).swapaxes(0, 1)  # (H, N, D)
    y, after = decayed_sum(by_head(C), by_head(B), values, log_decay, state[0], cache.lineage)
    y = y.swapaxes(0, 1)[None].astype(x.dtype) + x * D.reshape(1, 1, heads, 1)
    after_row = lambda row: after(row)[None]
    return y, cache.keep_state(after_row(rows - 1), after_row)


_SSM = {
    "ssm_attn": (
        _ssm_attn,
        ("x", "A_log", "B", "C", "D", "dt", "dt_bias", "state", "time_step_limit"),
    )
}
