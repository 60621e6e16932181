"""Records what flows through a model's embedding, layers and head in its own forward pass.

The watched modules get a subclass of their own class while a block runs and their own class back
afterwards, so no model file is copied and the model is left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import mlx.nn as nn

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class LinearCall:
    """A linear map that was applied: the module, its input and the width of its output."""

    module: nn.Module
    given: mx.array
    width: int


@dataclass
class Tape:
    """What was recorded, in the order in which calls returned."""

    embedding: nn.Module | None = None
    linear: list[LinearCall] = field(default_factory=list)
    layers: list[tuple[nn.Module, mx.array]] = field(default_factory=list)


@contextmanager
def recording(modules: Iterable[nn.Module], layers: Iterable[nn.Module] = ()) -> Iterator[Tape]:
    """Record what is called while the block runs.

    modules  whose embeddings and linear layers are watched
    layers   whose outputs are kept
    """
    tape = Tape()
    watched = [module for module in modules if isinstance(module, _LINEAR + _EMBEDDING)]
    outputs = list(layers)
    try:
        for module in watched:
            module._tape = tape
            module.__class__ = _watched(type(module))
        for layer in outputs:
            layer._tape = tape
            layer.__class__ = _heard(type(layer))
            watched.append(layer)
        yield tape
    finally:
        for module in watched:
            module.__class__ = type(module).__bases__[0]
            del module._tape


@cache
def _watched(cls: type) -> type:
    looks_up = issubclass(cls, _EMBEDDING)

    class Watched(cls):
        def __call__(self, x):
            out = super().__call__(x)
            if not looks_up:
                self._record(x, out)
            elif self._tape.embedding is None:
                self._tape.embedding = self
            return out

        def as_linear(self, x):
            out = super().as_linear(x)
            self._record(x, out)
            return out

        def _record(self, x, out):
            if isinstance(out, mx.array):  # fused layers give several
                self._tape.linear.append(LinearCall(self, x, out.shape[-1]))

    return Watched


@cache
def _heard(cls: type) -> type:
    class Heard(cls):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            self._tape.layers.append((self, out[0] if isinstance(out, tuple) else out))
            return out

    return Heard
