"""What heads with decoder layers of their own share in training: they read the target's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import View
from redrafter_mlx.training.recipes.recipe import Recipe
from redrafter_mlx.training.windows import Shards


@dataclass(frozen=True)
class ScaledView(View):
    """What a head reads, each column divided by its usual size.

    Some columns of a layer's output are a thousand times as large as others, and a learning rate
    that suits the small ones is too high for them. A saved head reads the columns as they are.
    """

    scale: mx.array

    def __call__(self, hidden: mx.array) -> mx.array:
        read = super().__call__(hidden)
        return read / self.scale.astype(read.dtype)


class LayersRecipe(Recipe):
    """For heads that read layers of the target through `fc`, trained on whole conversations."""

    whole, reads_final = True, False

    def prepare(self, shards: Shards) -> None:
        read = mx.concatenate(
            [self.view(b.hidden).reshape(-1, self.view.width) for b in self._some(shards, 1)]
        )
        scale = mx.sqrt((read.astype(mx.float32) ** 2).mean(axis=0) + 1e-6)
        self.view = ScaledView(self.view.parts, self.view.size, scale)
        device.finish(scale)

    def _written(self, head: nn.Module) -> dict[str, mx.array]:
        """The head's tensors, for columns that are not scaled."""
        tensors = dict(tree_flatten(head.parameters()))
        if isinstance(self.view, ScaledView):
            tensors["fc.weight"] = tensors["fc.weight"] / self.view.scale
        return tensors

    def _attention(self) -> dict[str, Any]:
        """Sizes of a decoder layer like the target's own."""
        args = getattr(self.target.model, "args", None)
        h = self.target.hidden_size
        heads = getattr(args, "num_attention_heads", None) or max(1, h // 64)
        head_dim = getattr(args, "head_dim", None) or h // heads
        return {
            "hidden_size": h,
            "num_hidden_layers": 1,
            "intermediate_size": getattr(args, "intermediate_size", None) or 3 * h,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(args, "num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "rms_norm_eps": 1e-5,
            "vocab_size": 1,
            "rope_theta": float(getattr(args, "rope_theta", None) or 10_000.0),
            "max_position_embeddings": getattr(args, "max_position_embeddings", None) or 32768,
            "tie_word_embeddings": False,
        }

    def _sizes(self, head: nn.Module) -> dict[str, Any]:
        """Sizes of a head and its layers, as config.json has them."""
        layer = head.config.layer
        return {
            "vocab_size": head.config.vocab_size,
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "num_hidden_layers": len(head.layers),
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "head_dim": layer.head_dim,
            "rms_norm_eps": layer.rms_norm_eps,
            "rope_theta": layer.rope_theta,
            "max_position_embeddings": layer.max_position_embeddings,
        }
