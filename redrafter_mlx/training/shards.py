"""Conversations on disk, as the target said them: one safetensors file for each batch of rows.

A shard holds T tokens of several conversations end to end:

    tokens      (T,)    int32
    roles       (T,)    uint8, see `lockstep.Role`
    starts      (n,)    int32 first token of each conversation
    hidden      (T, E)  the target's hidden state after each token, 16 bits
    top_ids     (T, K)  int32 the likeliest next tokens, in no order
    top_logits  (T, K)  float16 their logits below the highest

A file appears complete or not at all, so a killed run loses the batch that was under way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Conversation


@dataclass(frozen=True)
class Shard:
    """One file, opened: numpy views of its arrays, except `hidden`, which stays with mlx."""

    tokens: np.ndarray
    roles: np.ndarray
    starts: np.ndarray
    hidden: mx.array
    top_ids: np.ndarray
    top_logits: np.ndarray


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05}.safetensors"


def write_shard(path: Path, conversations: Sequence[Conversation], metadata: dict[str, str]) -> None:
    """Write the conversations to `path`, whole or not at all."""
    lengths = [len(c.tokens) for c in conversations]
    joined = lambda name: mx.concatenate([mx.array(getattr(c, name)) for c in conversations])
    arrays = {
        name: joined(name) for name in ("tokens", "roles", "hidden", "top_ids", "top_logits")
    }
    arrays["starts"] = mx.array(np.cumsum([0, *lengths[:-1]]).astype(np.int32))
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    mx.save_safetensors(str(partial), arrays, metadata)
    os.replace(partial, path)


def read_shard(path: Path) -> Shard:
    """The shard in `path`; UserError if it is damaged."""
    try:
        arrays = mx.load(str(path))
        small = {name: np.array(x) for name, x in arrays.items() if name != "hidden"}
        return Shard(hidden=arrays["hidden"], **small)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a complete shard of training data: {error}") from error
