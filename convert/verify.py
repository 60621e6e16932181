"""The source in PyTorch against the written head in MLX, on the same random inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redrafter_mlx.errors import UserError

from .formula import SCORES
from .head import Head
from .pickles import import_torch
from .torch_heads import computed, formula_of
from .torch_parts import Weights
from .weights import Recipe

EXACT = 1e-4
"""Of the largest logit. Both sides compute in float32 from the same numbers: what differs is the
order of sums of a few thousand terms, and that stays below 1e-5."""

ROUNDED = {"F32": EXACT, "F16": 5e-3, "BF16": 4e-2}
PACKED = {8: 0.1, 4: 0.5}
"""Of the largest logit. A weight is off by at most one part in 2^11, 2^8, or half a step of its
group; such errors are random and partly cancel. Golden, random and trained heads of hidden sizes
32 to 576 showed at most 5e-4, 4e-3, 3.5e-2 and 0.19; the limits are 2.6 to 10 times that. A tensor
that is swapped, transposed or missing makes it about 1. Errors grow in the layers of an EAGLE-3
head: random ones showed at most 3.7e-2 in bfloat16, 5.1e-2 and 0.45; their limits are twice those,
but none is above MOST. Those of DFlash 2 are four times as large: random ones showed 7.9e-2 and 0.2
with 8 bits. With 4 bits some of these err so much that no fault could be told from it."""

MOST = 0.8


@dataclass(frozen=True)
class Comparison:
    """Logits of the source and of the result; of a tied head, what the target's head would read.

    For a head that computes several things, the one that differs most.

    largest   absolute difference
    relative  that, over the largest absolute logit
    top1      share of the rows in which both have the same likeliest token
    limit     of `relative`, for the types that were chosen
    """

    largest: float
    relative: float
    top1: float
    limit: float
    rows: int

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} in logits, {self.relative:.2e} of the largest "
            f"logit (limit {self.limit:g}); same likeliest token in {self.top1:.1%} of {self.rows} "
            "rows"
        )


def verify(head: Head, directory: Path, recipe: Recipe) -> Comparison:
    """Compare a source with what was made of it.

    head       the source
    directory  the written head
    recipe     how it was made; the limit follows from it

    Raises UserError if torch is missing, or if the difference cannot be explained by rounding.
    """
    weights = Weights(import_torch("--verify"), head)
    formula = formula_of(head)
    given = formula.inputs(head.config, np.random.default_rng(0))
    limit, compared = _limit(head, recipe, formula.depth(head.config)), []
    for part, (theirs, ours) in computed(formula, weights, directory, given).items():
        if part == SCORES and recipe.kept is not None:
            theirs = theirs[:, recipe.kept]
        compared.append(_compared(theirs, ours, limit))
    # a NaN is the worst
    found = max(compared, key=lambda c: np.nan_to_num(c.relative, nan=np.inf))
    if not found.relative <= found.limit:
        raise UserError(
            f"--verify: the result does not compute what the source computes: {found}; nothing "
            "was written"
        )
    return found


def _compared(theirs: np.ndarray, ours: np.ndarray, limit: float) -> Comparison:
    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return Comparison(
        largest=difference,
        relative=difference / scale if scale else difference,
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        limit=limit,
        rows=len(ours),
    )


def _limit(head: Head, recipe: Recipe, depth: float) -> float:
    limit = _limit_of_one(head, recipe)
    return limit if limit == EXACT else min(limit * depth, MOST)


def _limit_of_one(head: Head, recipe: Recipe) -> float:
    if recipe.packing:
        return PACKED[recipe.packing.bits]
    floats = {tensor.dtype for tensor in head.tensors.values()} - {"U32"}
    if recipe.dtype and (floats != {recipe.dtype} or recipe.unpack):
        return ROUNDED[recipe.dtype]
    if recipe.unpack:
        return max(ROUNDED[dtype] for dtype in floats)
    return EXACT
