"""How Medusa heads are created, trained, evaluated and saved."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.medusa import MedusaConfig, MedusaDrafter, MedusaHead
from redrafter_mlx.drafters.published import save_published
from redrafter_mlx.machine import device
from redrafter_mlx.training import features
from redrafter_mlx.training.objective import Features, Output, tied_output, trained_output
from redrafter_mlx.training.recipes.recipe import Recipe


class Medusa(Recipe):
    name = "medusa"
    about = "Medusa heads ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774))"
    empty = MedusaHead
    takes = ("draft_vocab", "output_layer", "blocks")

    def config(self, draft_vocab_size: int, ahead: int) -> MedusaConfig:
        target = self.target
        blocks = max(1, self.options.blocks)
        return MedusaConfig(
            target.vocab_size, target.hidden_size, ahead, blocks, draft_vocab_size, self.tied
        )  # fmt: skip

    def new(self, config, ids, shards, ahead, key):
        """Blocks that do nothing yet, as the reference has it, and the target's output layer."""
        head = super().new(config, ids, shards, ahead, key)
        for layers in head.heads:
            for block in layers[: config.blocks]:
                block.linear.weight = mx.zeros_like(block.linear.weight)
                block.linear.bias = mx.zeros_like(block.linear.bias)
            if not config.shared:
                layers[-1].weight = self._rows(ids)
        device.finish(head.parameters())
        return head

    def features(self, steps: int) -> Features:
        return partial(features.medusa, self.view, steps)

    def output(self, head: MedusaHead, ids: mx.array) -> Output:
        if head.config.shared:
            return tied_output(self.target.output_layer)
        of_head = lambda k: trained_output(
            ids, self.target.vocab_size, lambda head: head.heads[k][-1]
        )
        heads = [of_head(k) for k in range(head.config.heads)]

        def output(features: mx.array, candidates: mx.array, head: MedusaHead) -> mx.array:
            steps = zip(heads, mx.split(features, len(heads)), strict=True)
            return mx.concatenate([one(step, candidates, head) for one, step in steps])

        return output

    def drafter(self, head: MedusaHead, ids: mx.array) -> MedusaDrafter:
        return MedusaDrafter(head, self._vocabulary(ids), self.view, {})

    def save(self, path, head, ids, dtype) -> None:
        c = head.config
        settings = {
            "medusa_num_heads": c.heads,
            "medusa_num_layers": c.blocks,
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
        } | ({"version": "2"} if c.shared else {})
        tensors = {n.removeprefix("heads."): x for n, x in tree_flatten(head.parameters())}
        save_published(path, settings, tensors, ids, c.vocab_size, dtype)
