"""A head that is trained further: its shape as options, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from redrafter_mlx.config import flag_name
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import drafters
from redrafter_mlx.machine import device
from redrafter_mlx.training.options import HeadOptions


def shape_of(name: str, given: HeadOptions) -> HeadOptions:
    """The options that describe an existing head; UserError if `given` ones contradict them."""
    c = load_head(drafters.resolve_drafter(name), mx.float32)[0].config
    output_layer = "tied" if c.tied_output else "trained"
    lookback_heads = c.lookback_heads or given.lookback_heads or 0  # it can learn to look back
    shape = HeadOptions(
        exit_dim=c.exit_dim, blocks=c.num_blocks, no_rnn=not c.rnn, draft_vocab=c.draft_vocab_size,
        output_layer=output_layer, fused_layers=c.fused_layers, lookback_heads=lookback_heads,
    )  # fmt: skip
    for f in fields(HeadOptions):
        wanted, found = getattr(given, f.name), getattr(shape, f.name)
        if wanted not in (f.default, found):
            raise UserError(
                f"{flag_name(f)} {wanted}: the head of --start-from {name} has {found}; leave it "
                "out"
            )
    return shape


def fingerprint(head: nn.Module) -> str:
    """16 hex digits of a head's weights."""
    digest = hashlib.sha256()
    for name, weights in tree_flatten(head.parameters()):
        digest.update(name.encode())
        digest.update(device.read(weights)[0].tobytes())
    return digest.hexdigest()[:16]
