"""The source in PyTorch against the written head in MLX, on the same random inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx import device
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.errors import UserError

from .head import Head
from .pickles import import_torch
from .reading import read_head
from .sources import open_source
from .weights import Recipe, as_mlx, as_numpy

ROWS, STEPS = 16, 4
EXACT = 1e-4
"""Of the largest logit. Both sides compute in float32 from the same numbers: what differs is the
order of sums of a few thousand terms, and that stays below 1e-5."""

ROUNDED = {"F32": EXACT, "F16": 5e-3, "BF16": 4e-2}
PACKED = {8: 0.1, 4: 0.5}
"""Of the largest logit. A weight is off by at most one part in 2^11, 2^8, or half a step of its
group; such errors are random and partly cancel. Golden, random and trained heads of hidden sizes
32 to 576 showed at most 5e-4, 4e-3, 3.5e-2 and 0.19; the limits are 2.6 to 10 times that. A tensor
that is swapped, transposed or missing makes it about 1."""


@dataclass(frozen=True)
class Comparison:
    """Logits of the source and of the result; of a tied head, what the target's head would read.

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


def verify(head: Head, directory: Path, recipe: Recipe, seed: int = 0) -> Comparison:
    """Compare a source with what was made of it.

    head       the source
    directory  the written head
    recipe     how it was made; the limit follows from it

    Raises UserError if torch is missing, or if the difference cannot be explained by rounding.
    """
    torch = import_torch("--verify")
    config = head.config
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((ROWS, config.context_size), np.float32)
    embeddings = rng.standard_normal((STEPS, ROWS, config.hidden_size), np.float32)
    kept = recipe.kept
    theirs = _logits_in_torch(torch, head, context, embeddings, kept)
    ours = _logits_in_mlx(directory, context, embeddings)
    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    found = Comparison(
        largest=difference,
        relative=difference / scale if scale else difference,
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        limit=_limit(head, recipe),
        rows=len(ours),
    )
    if not found.relative <= found.limit:
        raise UserError(
            f"--verify: the result does not compute what the source computes: {found}; nothing "
            "was written"
        )
    return found


def _limit(head: Head, recipe: Recipe) -> float:
    if recipe.packing:
        return PACKED[recipe.packing.bits]
    floats = {tensor.dtype for tensor in head.tensors.values()} - {"U32"}
    if recipe.dtype and (floats != {recipe.dtype} or recipe.unpack):
        return ROUNDED[recipe.dtype]
    if recipe.unpack:
        return max(ROUNDED[dtype] for dtype in floats)
    return EXACT


def _logits_in_torch(
    torch: Any, head: Head, context: np.ndarray, embeddings: np.ndarray, kept: np.ndarray | None
) -> np.ndarray:
    """Logits (STEPS * ROWS, D) of the source, in float32; written from the paper's formulas."""
    linear = lambda module, x: _torch_linear(torch, head, module, x)
    silu = lambda x: x * torch.sigmoid(x)
    found, size = [], head.config.hidden_size
    final, *fused = torch.from_numpy(context).split(size, dim=-1)
    state = torch.zeros_like(final)
    scaled = [x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) for x in fused]
    c = torch.cat([final, *scaled], dim=-1)
    for step in embeddings:
        embedding = torch.from_numpy(step)
        if head.config.rnn:
            state = silu(linear("rnn_w", embedding) + linear("rnn_u", state))
        else:
            state = state + embedding
        y = torch.cat([c, state], dim=-1)
        if "input_proj.weight" in head.tensors:
            y = linear("input_proj", y)
        for i in range(head.config.num_blocks):
            y = y + silu(linear(f"lm_head.{i}.linear", y))
        found.append(y if head.config.tied_output else linear(head.outputs[0], y))
    logits = torch.cat(found).numpy()
    return logits if kept is None or head.config.tied_output else logits[:, kept]


def _torch_linear(torch: Any, head: Head, module: str, x: Any) -> Any:
    """x (R, in) times the module's weight, a block of its rows at a time, plus its bias."""
    count = head.tensors[f"{module}.weight"].shape[0]
    width = x.shape[-1]
    step = max(1, 2**24 // width)
    pieces = []
    for start in range(0, count, step):
        weight = _float32_rows(torch, head, module, start, min(count, start + step))
        pieces.append(x @ weight.T)
    y = torch.cat(pieces, dim=-1)
    if f"{module}.bias" in head.tensors:
        bias = head.tensors[f"{module}.bias"]
        y = y + _torch_floats(torch, bias.whole(), bias.dtype)
    return y


def _float32_rows(torch: Any, head: Head, module: str, start: int, stop: int) -> Any:
    weight = head.tensors[f"{module}.weight"]
    if weight.dtype != "U32":
        return _torch_floats(torch, weight.rows(start, stop), weight.dtype)
    # PyTorch knows no such packing: here mlx unpacks for both sides.
    parts = [head.tensors[f"{module}.{name}"] for name in ("weight", "scales", "biases")]
    packed, *scaling = [as_mlx(part.rows(start, stop), part) for part in parts]
    scaling = [array.astype(mx.float32) for array in scaling]
    plain = mx.dequantize(packed, *scaling, head.packing.group_size, head.packing.bits)
    return torch.from_numpy(as_numpy(plain).copy())


def _torch_floats(torch: Any, array: np.ndarray, dtype: str) -> Any:
    found = torch.from_numpy(array.copy())
    return (found.view(torch.bfloat16) if dtype == "BF16" else found).to(torch.float32)


def _logits_in_mlx(directory: Path, context: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    written = read_head(open_source(str(directory)))
    if written.layout in ("apple", "mlx"):
        head, _, _ = load_head(directory, mx.float32)  # what generate will do
    else:
        head = _assembled(written)
    c, state, found = mx.array(context), None, []
    for step in embeddings:
        state = head.advance(state, mx.array(step))
        found.append(head(head.read(c), state))
    (logits,) = device.read(mx.concatenate(found))
    return logits


def _assembled(written: Head) -> RecurrentHead:
    """A head of a layout that the package does not load itself."""
    head = RecurrentHead(written.config)
    weights = [
        (name, as_mlx(x.whole(), x).astype(mx.float32)) for name, x in written.tensors.items()
    ]
    head.load_weights(weights)
    return head
