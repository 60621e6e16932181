"""Medusa heads (arXiv 2401.10774) in PyTorch and in MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.medusa import KIND
from redrafter_mlx.drafters.published import load_published

from .formula import ROWS, SCORES, Formula, Inputs, normal
from .torch_parts import Weights


def _part(config: Any) -> str:
    return "hidden" if config.shared else SCORES


def _medusa_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    return {"states": normal(generator, ROWS, config.hidden_size)}


def _medusa_in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    torch, config, found = weights.torch, weights.head.config, []
    for i in range(config.heads):
        y = torch.from_numpy(given["states"])
        for j in range(config.blocks):
            y = y + torch.nn.functional.silu(weights.linear(f"heads.{i}.{j}.linear", y))
        found.append(y if config.shared else weights.linear(f"heads.{i}.{config.blocks}", y))
    return {_part(config): torch.cat(found)}


def _medusa_in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    head, _ = load_published(KIND, directory, mx.float32)
    found = head(mx.array(given["states"]), head.config.heads).flatten(0, 1)
    return {_part(head.config): found}


MEDUSA = Formula(_medusa_inputs, _medusa_in_torch, _medusa_in_mlx)
