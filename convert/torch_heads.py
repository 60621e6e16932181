"""Formulas of all kinds of heads: in PyTorch as published, and in MLX as the package computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device

from .formula import Formula, Inputs
from .head import Head
from .torch_dflash import DFLASH
from .torch_eagle3 import EAGLE3
from .torch_medusa import MEDUSA
from .torch_mtp import MTP
from .torch_parts import Weights
from .torch_recurrent import RECURRENT

FORMULAS = {
    "recurrent": RECURRENT,
    "medusa": MEDUSA,
    "eagle3": EAGLE3,
    "dflash": DFLASH,
    "mtp": MTP,
}


def formula_of(head: Head) -> Formula:
    """The formula of a head's kind; UserError if there is none."""
    found = FORMULAS.get(head.kind)
    if found is None or not found.knows(head):
        this = f"this head of the kind {head.kind}" if found else f"heads of the kind {head.kind}"
        raise UserError(f"--verify has no formula for {this}: leave it out")
    return found


def computed(
    formula: Formula, weights: Weights, directory: Path, given: Inputs
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """By part, what the source computes in PyTorch and what the result computes in MLX."""
    found = formula.in_mlx(directory, given)
    ours = dict(zip(found, device.read(*found.values()), strict=True))
    with weights.torch.inference_mode():
        theirs = formula.in_torch(weights, {**given, **ours})
    return {part: (theirs[part].numpy(), ours[part]) for part in ours}
