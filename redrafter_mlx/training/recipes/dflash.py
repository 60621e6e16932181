"""How a DFlash head is created, trained, evaluated and saved."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx_lm.models import qwen3

from redrafter_mlx.drafters.block import BlockConfig, BlockHead, Sight
from redrafter_mlx.drafters.dflash import DFlashDrafter
from redrafter_mlx.drafters.eagle3 import reads_by_default
from redrafter_mlx.drafters.published import save_published
from redrafter_mlx.machine import device
from redrafter_mlx.training import features
from redrafter_mlx.training.initial import read_out
from redrafter_mlx.training.objective import Features
from redrafter_mlx.training.options import HeadOptions
from redrafter_mlx.training.recipes.layers import LayersRecipe

LAYERS = 2
"""Of a new head, by default."""


class DFlash(LayersRecipe):
    name = "dflash"
    about = "A DFlash head ([arXiv 2602.06036](https://arxiv.org/abs/2602.06036))"
    empty = BlockHead
    takes = ("draft_vocab", "fused_layers", "layers")

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        return tuple(options.fused_layers) or reads_by_default(layers)

    def config(self, draft_vocab_size: int, ahead: int) -> BlockConfig:
        target, layers = self.target, self.options.layers or LAYERS
        return BlockConfig(
            layer=qwen3.ModelArgs(model_type="qwen3", **self._attention()),
            sights=(Sight(None, False),) * layers,
            reads=self.reads(len(target.model.layers), self.options),
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            block_size=1 + ahead,
            mask_token_id=0,
        )

    def new(self, config, ids, shards, ahead, key):
        head = super().new(config, ids, shards, ahead, key)
        head.norm.weight = read_out(self._some(shards, ahead), self.view.size)
        device.finish(head.parameters())
        return head

    def features(self, steps: int) -> Features:
        return partial(features.dflash, self.target.embed, self.view, steps)

    def drafter(self, head: BlockHead, ids: mx.array) -> DFlashDrafter:
        return DFlashDrafter(head, self._vocabulary(ids), self.target.embed, self.view, {})

    def save(self, path, head, ids, dtype) -> None:
        c = head.config
        settings = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **self._sizes(head),
            "num_target_layers": len(self.target.model.layers),
            "block_size": c.block_size,
            "dflash_config": {
                "mask_token_id": c.mask_token_id,
                "target_layer_ids": list(c.reads),
            },
            "layer_types": ["full_attention"] * len(head.layers),
        }
        save_published(path, settings, self._written(head), ids, c.vocab_size, dtype)
