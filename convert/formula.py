"""What the formula of a kind of head is, and what all formulas share.

Shape letters: R rows, D draft vocabulary, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .head import Head
from .torch_parts import Weights

ROWS, STEPS = 16, 4
Inputs = Mapping[str, np.ndarray]

SCORES = "scores"
"""Of what a head computes, the part with a column for each of its draft ids, (R, D). Other parts
are `hidden` (R, h), what the target's output layer reads, and, of each head with experts, by what
its router chooses, (R, experts), and what it chose."""


@dataclass(frozen=True)
class Formula:
    """One kind of head in both frameworks.

    inputs    shape, generator -> random inputs
    in_mlx    directory of the result, inputs -> what it computes, by part
    in_torch  weights of the source, inputs -> the same. Beside the inputs it is given what
              MLX computed, for choices that rounding may turn: which experts compute
    depth     its shape -> by what factor rounding errors exceed those of a recurrent head
    knows     whether it holds for a head: a kind may have several
    """

    inputs: Callable[[Any, np.random.Generator], Inputs]
    in_torch: Callable[[Weights, Inputs], dict[str, Any]]
    in_mlx: Callable[[Path, Inputs], dict[str, mx.array]]
    depth: Callable[[Any], float] = lambda config: 1
    knows: Callable[[Head], bool] = lambda head: True


def normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape, np.float32)
