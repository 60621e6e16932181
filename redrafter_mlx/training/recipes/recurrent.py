"""How a recurrent head is created, trained, evaluated and saved."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import islice

import mlx.core as mx

from redrafter_mlx.drafters.checkpoint import save_head
from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.training import features
from redrafter_mlx.training.initial import initial_head
from redrafter_mlx.training.objective import Features, Output, tied_output, trained_output
from redrafter_mlx.training.recipes.recipe import FIT_BATCHES, Recipe

LOOKBACK_HEADS = 2
"""Of a new head, by default."""


class Recurrent(Recipe):
    name = "recurrent"
    about = "A recurrent draft head ([ReDrafter](https://arxiv.org/abs/2403.09919))"
    empty = RecurrentHead
    takes = (
        "draft_vocab", "output_layer", "exit_dim", "blocks", "no_rnn", "fused_layers",
        "lookback_heads",
    )  # fmt: skip

    def config(self, draft_vocab_size: int, ahead: int) -> HeadConfig:
        options, target = self.options, self.target
        exit_dim = options.exit_dim or target.hidden_size
        if self.tied and exit_dim != target.hidden_size:
            raise UserError(
                f"--exit-dim {exit_dim}: a tied output needs the target's hidden size "
                f"{target.hidden_size}; leave it out or give --output-layer trained"
            )
        lookback = options.lookback_heads
        return HeadConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            exit_dim=exit_dim,
            num_blocks=options.blocks,
            rnn=not options.no_rnn,
            draft_vocab_size=draft_vocab_size,
            tied_output=self.tied,
            fused_layers=tuple(options.fused_layers),
            lookback_heads=LOOKBACK_HEADS if lookback is None else lookback,
        )

    def new(self, config, ids, shards, ahead, key):
        fit = islice(shards.batches("fit", 64, 2 * ahead), FIT_BATCHES)
        viewed = (dataclasses.replace(b, hidden=self.view(b.hidden)) for b in fit)
        return initial_head(
            config, self.target.embed, self.target.output_layer, ids, viewed, ahead, key
        )

    def past(self, head: RecurrentHead) -> slice | None:
        """Columns of what was captured; `lookback_columns` are those of what the head reads."""
        if not head.config.lookback_heads:
            return None
        part = self.view.parts[1 if head.config.fused_layers else 0]
        return slice(part * self.view.size, (part + 1) * self.view.size)

    def features(self, steps: int) -> Features:
        return partial(features.recurrent, self.target.embed, self.view, steps)

    def output(self, head: RecurrentHead, ids: mx.array) -> Output:
        if head.config.tied_output:
            return tied_output(self.target.output_layer)
        return trained_output(ids, self.target.vocab_size, lambda head: head.lm_head[-1])

    def drafter(self, head: RecurrentHead, ids: mx.array) -> RecurrentDrafter:
        output = self.target.output_layer if head.config.tied_output else None
        return RecurrentDrafter(head, ids, self.target.embed, output, self.view)

    def save(self, path, head, ids, dtype) -> None:
        save_head(path, head, ids, dtype)
