"""The recurrent head (arXiv 2403.09919) in PyTorch and in MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead

from .formula import ROWS, SCORES, STEPS, Formula, Inputs, normal
from .reading import read_head
from .sources import open_source
from .torch_parts import Weights, rms_normed
from .weights import as_mlx


def _part(config: Any) -> str:
    return "hidden" if config.tied_output else SCORES


def _recurrent_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    return {
        "context": normal(generator, ROWS, config.context_size),
        "embedded": normal(generator, STEPS, ROWS, config.hidden_size),
    }


def _recurrent_in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    torch, config = weights.torch, weights.head.config
    silu = torch.nn.functional.silu
    final, *fused = torch.from_numpy(given["context"]).split(config.hidden_size, dim=-1)
    context = torch.cat([final, *(rms_normed(torch, x, 1e-6) for x in fused)], dim=-1)
    state, found = torch.zeros_like(final), []
    for embedded in torch.from_numpy(given["embedded"]):
        if config.rnn:
            state = silu(weights.linear("rnn_w", embedded) + weights.linear("rnn_u", state))
        else:
            state = state + embedded
        y = torch.cat([context, state], dim=-1)
        y = weights.linear("input_proj", y) if "input_proj.weight" in weights else y
        for i in range(config.num_blocks):
            y = y + silu(weights.linear(f"lm_head.{i}.linear", y))
        output = f"lm_head.{config.num_blocks}"
        found.append(y if config.tied_output else weights.linear(output, y))
    return {_part(config): torch.cat(found)}


def _recurrent_in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    written = read_head(open_source(str(directory)))
    if written.layout in ("apple", "mlx"):
        head, _ = load_head(directory, mx.float32)  # what generate will do
    else:  # a layout that the package does not load itself
        head = RecurrentHead(written.config)
        arrays = {n: as_mlx(x.whole(), x).astype(mx.float32) for n, x in written.tensors.items()}
        head.load_weights(list(arrays.items()))
    context, state, found = mx.array(given["context"]), None, []
    for embedded in given["embedded"]:
        state = head.advance(state, mx.array(embedded))
        found.append(head(head.read(context), state))
    return {_part(written.config): mx.concatenate(found)}


RECURRENT = Formula(_recurrent_inputs, _recurrent_in_torch, _recurrent_in_mlx)
