"""How an EAGLE-3 head is created, trained, evaluated and saved."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx_lm.models import llama

from redrafter_mlx.drafters.attention import AttentionDrafter
from redrafter_mlx.drafters.eagle3 import Eagle3Config, Eagle3Head, reads_by_default
from redrafter_mlx.drafters.published import save_published
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.training import features
from redrafter_mlx.training.initial import fit_reading, read_out
from redrafter_mlx.training.objective import Features
from redrafter_mlx.training.options import HeadOptions
from redrafter_mlx.training.recipes.layers import LayersRecipe


class Eagle3(LayersRecipe):
    name = "eagle3"
    about = "An EAGLE-3 head ([arXiv 2503.01840](https://arxiv.org/abs/2503.01840))"
    empty = Eagle3Head
    takes = ("draft_vocab", "output_layer", "fused_layers")

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        """Ascending, as every reader assumes; fewer than three if the target has few layers."""
        asked = options.fused_layers or (max(1, layer) for layer in reads_by_default(layers))
        return tuple(sorted(set(asked)))

    def config(self, draft_vocab_size: int, ahead: int) -> Eagle3Config:
        target = self.target
        reads = self.reads(len(target.model.layers), self.options)
        if 0 in reads:
            raise UserError(
                "--fused-layers 0: files of eagle3 heads cannot say that the first layer is read; "
                "give others"
            )
        return Eagle3Config(
            layer=llama.ModelArgs(model_type="llama", **self._attention()),
            layers=1,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            target_hidden_size=target.hidden_size,
            reads=reads,
            captured=len(reads),
            own_output=not self.tied,
        )

    def new(self, config, ids, shards, ahead, key):
        """A layer that does nothing yet, on the best linear prediction from what it reads."""
        head = super().new(config, ids, shards, ahead, key)
        batches = self._some(shards, ahead)
        layer, head.norm.weight = head.layers[0], read_out(batches, self.view.size)
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight = mx.zeros_like(last.weight)
        if (fitted := fit_reading(batches, self.view, head.norm.weight)) is not None:
            head.fc.weight = fitted
        if config.own_output:
            head.lm_head.weight = self._rows(ids)
        device.finish(head.parameters())
        return head

    def features(self, steps: int) -> Features:
        return partial(features.eagle3, self.target.embed, self.view, steps)

    def drafter(self, head: Eagle3Head, ids: mx.array) -> AttentionDrafter:
        return AttentionDrafter(head, self._vocabulary(ids), self.target.embed, self.view)

    def save(self, path, head, ids, dtype) -> None:
        """In SafeAILab's layout, which has rows of its own for the output layer in any case."""
        c = head.config
        settings = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            **self._sizes(head),
            "draft_vocab_size": len(ids),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            # boundaries between layers, which vLLM and, unless they begin with 1, SGLang take these
            # for (see `drafters.eagle3.reads_of`): the output of layer i is the input of i + 1
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in c.reads],
        }
        tensors = {
            name.replace("layers.0.", "midlayer.", 1): x for name, x in self._written(head).items()
        }
        order = mx.argsort(ids)
        ids = ids[order]  # readers assume ascending ids
        tensors["lm_head.weight"] = head.lm_head.weight[order] if c.own_output else self._rows(ids)
        tensors["t2d"] = mx.zeros(c.vocab_size, mx.bool_)
        tensors["t2d"][ids] = True
        save_published(path, settings, tensors, ids, c.vocab_size, dtype)
