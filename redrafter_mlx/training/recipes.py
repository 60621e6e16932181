"""How each kind of head is made, taught, tried and kept. The trainer knows no kinds but by these.

Shape letters: D draft vocabulary, h hidden size.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3

from redrafter_mlx.drafters.attention import AttentionDrafter
from redrafter_mlx.drafters.beams import BeamDrafter
from redrafter_mlx.drafters.block import BlockConfig, BlockHead, Sight
from redrafter_mlx.drafters.checkpoint import save_head
from redrafter_mlx.drafters.dflash import DFlashDrafter
from redrafter_mlx.drafters.eagle3 import Eagle3Config, Eagle3Head, reads_by_default
from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.drafters.medusa import MedusaConfig, MedusaDrafter, MedusaHead
from redrafter_mlx.drafters.published import save_published, targets_vocabulary
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.drafters.text import OwnVocabulary, TextVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import View
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training import features
from redrafter_mlx.training.initial import fit_reading, initial_head, read_out
from redrafter_mlx.training.objective import Features, Output, tied_output, trained_output
from redrafter_mlx.training.options import HeadOptions
from redrafter_mlx.training.windows import Batch, Shards

FIT_BATCHES = 24
LOOKBACK_HEADS = 2
"""Of a new recurrent head, if nothing else is asked for."""
DFLASH_LAYERS = 2
"""Of a new block head, if nothing else is asked for."""


@dataclass(frozen=True)
class ScaledView(View):
    """What a head reads, each column over its usual size.

    Some columns of a layer's output are a thousand times as large as others: steps that suit the
    small ones would throw the sum about. What is learnt is written for the columns as they are.
    """

    scale: mx.array

    def __call__(self, hidden: mx.array) -> mx.array:
        read = super().__call__(hidden)
        return read / self.scale.astype(read.dtype)


class Recipe(ABC):
    """One kind of head for one target.

    name   of the kind; about and source say in a model card what it is
    whole  whether it is taught whole conversations
    takes  names of the HeadOptions that mean something to it
    """

    name: str
    about: str
    whole = False
    takes: tuple[str, ...] = ("draft_vocab", "output_layer")

    def __init__(self, target: Target, options: HeadOptions):
        self.target, self.options = target, options
        layers = self.reads(len(target.model.layers), options)
        self.view: View = target.tap(layers, final=self.reads_final)

    reads_final = True

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        """Of a target with so many layers, those whose outputs the head reads."""
        return tuple(options.fused_layers)

    @property
    def tied(self) -> bool:
        """Whether it is taught with rows of the target's own output layer."""
        return self.options.output_layer == "tied"

    def prepare(self, shards: Shards) -> None:  # noqa: B027
        """Learn of the data what the head's inputs look like."""

    @abstractmethod
    def config(self, draft_vocab_size: int, ahead: int) -> Any:
        """The shape that the options mean; UserError if they do not fit together.

        ahead  tokens that a position predicts
        """

    @abstractmethod
    def empty(self, config: Any) -> nn.Module:
        """A head of a shape."""

    def new(self, config: Any, ids: mx.array, shards: Shards, ahead: int, key: mx.array):
        """An untrained head in float32 that proposes the token ids (D,)."""
        mx.random.seed(int(mx.random.randint(0, 2**30, key=key)))
        head = self.empty(config)
        device.finish(head.parameters())
        return head

    def past(self, head: nn.Module) -> slice | None:
        """Columns of the text before short windows that it reads, too."""
        return None

    @abstractmethod
    def features(self, steps: int) -> Features:
        """What its output layer reads of a batch."""

    def output(self, head: nn.Module, ids: mx.array) -> Output:
        """Its output layer in training; ids (D,) of its draft vocabulary."""
        if self.tied:
            return tied_output(self.target.output_layer)
        return trained_output(ids, self.target.vocab_size, lambda head: head.lm_head)

    @abstractmethod
    def drafter(self, head: nn.Module, ids: mx.array) -> BeamDrafter:
        """Drafts with the weights that it has now."""

    @abstractmethod
    def save(self, path: Path, head: nn.Module, ids: mx.array, dtype: mx.Dtype) -> None:
        """Write config.json and model.safetensors into the directory."""

    def _some(self, shards: Shards, ahead: int) -> list[Batch]:
        """A few batches to begin with."""
        return list(islice(shards.batches("fit", 4 if self.whole else 64, ahead), FIT_BATCHES))

    def _vocabulary(self, ids: mx.array) -> OwnVocabulary | TextVocabulary:
        if not self.tied:
            return OwnVocabulary(ids)
        return targets_vocabulary(self.target, np.array(ids))

    def _rows(self, ids: mx.array) -> mx.array:
        """(D, h) of the target's own output layer, unpacked."""
        layer = self.target.output_layer(ids)
        return layer(mx.eye(self.target.hidden_size, dtype=mx.float32)).T.astype(mx.float32)

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


class Recurrent(Recipe):
    name = "recurrent"
    about = "A recurrent draft head ([ReDrafter](https://arxiv.org/abs/2403.09919))"
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

    def empty(self, config: HeadConfig) -> RecurrentHead:
        return RecurrentHead(config)

    def new(self, config, ids, shards, ahead, key):
        fit = islice(shards.batches("fit", 64, 2 * ahead), FIT_BATCHES)
        viewed = (dataclasses.replace(b, hidden=self.view(b.hidden)) for b in fit)
        return initial_head(
            config, self.target.embed, self.target.output_layer, ids, viewed, ahead, key
        )

    def past(self, head: RecurrentHead) -> slice | None:
        """Of what was captured: `lookback_columns` counts in what the head reads."""
        if not head.config.lookback_heads:
            return None
        part = self.view.parts[1 if head.config.fused_layers else 0]
        return slice(part * self.view.size, (part + 1) * self.view.size)

    def features(self, steps: int) -> Features:
        return features.recurrent(self.target.embed, self.view, steps)

    def output(self, head: RecurrentHead, ids: mx.array) -> Output:
        if head.config.tied_output:
            return tied_output(self.target.output_layer)
        return trained_output(ids, self.target.vocab_size, lambda head: head.lm_head[-1])

    def drafter(self, head: RecurrentHead, ids: mx.array) -> RecurrentDrafter:
        output = self.target.output_layer if head.config.tied_output else None
        return RecurrentDrafter(head, ids, self.target.embed, output, self.view)

    def save(self, path, head, ids, dtype) -> None:
        save_head(path, head, ids, dtype)


class Medusa(Recipe):
    name = "medusa"
    about = "Medusa heads ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774))"
    takes = ("draft_vocab", "output_layer", "blocks")

    def config(self, draft_vocab_size: int, ahead: int) -> MedusaConfig:
        target = self.target
        blocks = max(1, self.options.blocks)
        return MedusaConfig(
            target.vocab_size, target.hidden_size, ahead, blocks, draft_vocab_size, self.tied
        )  # fmt: skip

    def empty(self, config: MedusaConfig) -> MedusaHead:
        return MedusaHead(config)

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
        return features.medusa(self.target.embed, self.view, steps)

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


class LayersRecipe(Recipe):
    """Of heads that read layers of the target through `fc`, and are taught whole conversations."""

    whole, reads_final = True, False

    def prepare(self, shards: Shards) -> None:
        read = mx.concatenate(
            [self.view(b.hidden).reshape(-1, self.view.width) for b in self._some(shards, 1)]
        )
        scale = mx.sqrt((read.astype(mx.float32) ** 2).mean(axis=0) + 1e-6)
        self.view = ScaledView(self.view.parts, self.view.size, scale)
        device.finish(scale)

    def _written(self, head: nn.Module) -> dict[str, mx.array]:
        """The head's tensors, for what it reads as it is."""
        tensors = dict(tree_flatten(head.parameters()))
        if isinstance(self.view, ScaledView):
            tensors["fc.weight"] = tensors["fc.weight"] / self.view.scale
        return tensors


class Eagle3(LayersRecipe):
    name = "eagle3"
    about = "An EAGLE-3 head ([arXiv 2503.01840](https://arxiv.org/abs/2503.01840))"
    takes = ("draft_vocab", "output_layer", "fused_layers")

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        """Ascending, as every reader takes for granted; of few layers fewer than three."""
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

    def empty(self, config: Eagle3Config) -> Eagle3Head:
        return Eagle3Head(config)

    def new(self, config, ids, shards, ahead, key):
        """A layer that does nothing yet, after the best linear guess from what it reads."""
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
        return features.eagle3(self.target.embed, self.view, steps)

    def drafter(self, head: Eagle3Head, ids: mx.array) -> AttentionDrafter:
        return AttentionDrafter(head, self._vocabulary(ids), self.target.embed, self.view)

    def save(self, path, head, ids, dtype) -> None:
        """In SafeAILab's layout, which has rows of its own for the output layer in any case."""
        c, layer = head.config, head.config.layer
        settings = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "vocab_size": c.vocab_size,
            "draft_vocab_size": len(ids),
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "head_dim": layer.head_dim,
            "rms_norm_eps": layer.rms_norm_eps,
            "rope_theta": layer.rope_theta,
            "max_position_embeddings": layer.max_position_embeddings,
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
        ids = ids[order]  # readers take ascending ids for granted
        tensors["lm_head.weight"] = head.lm_head.weight[order] if c.own_output else self._rows(ids)
        tensors["t2d"] = mx.zeros(c.vocab_size, mx.bool_)
        tensors["t2d"][ids] = True
        save_published(path, settings, tensors, ids, c.vocab_size, dtype)


class DFlash(LayersRecipe):
    name = "dflash"
    about = "A DFlash head ([arXiv 2602.06036](https://arxiv.org/abs/2602.06036))"
    takes = ("draft_vocab", "fused_layers", "layers")

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        return tuple(options.fused_layers) or reads_by_default(layers)

    def config(self, draft_vocab_size: int, ahead: int) -> BlockConfig:
        target, layers = self.target, self.options.layers or DFLASH_LAYERS
        return BlockConfig(
            layer=qwen3.ModelArgs(model_type="qwen3", **self._attention()),
            sights=(Sight(None, False),) * layers,
            reads=self.reads(len(target.model.layers), self.options),
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            block_size=1 + ahead,
            mask_token_id=0,
        )

    def empty(self, config: BlockConfig) -> BlockHead:
        return BlockHead(config)

    def new(self, config, ids, shards, ahead, key):
        head = super().new(config, ids, shards, ahead, key)
        head.norm.weight = read_out(self._some(shards, ahead), self.view.size)
        device.finish(head.parameters())
        return head

    def features(self, steps: int) -> Features:
        return features.dflash(self.target.embed, self.view, steps)

    def drafter(self, head: BlockHead, ids: mx.array) -> DFlashDrafter:
        return DFlashDrafter(head, self._vocabulary(ids), self.target.embed, self.view, {})

    def save(self, path, head, ids, dtype) -> None:
        c, layer = head.config, head.config.layer
        settings = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "vocab_size": c.vocab_size,
            "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size,
            "num_hidden_layers": len(head.layers),
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "head_dim": layer.head_dim,
            "rms_norm_eps": layer.rms_norm_eps,
            "rope_theta": layer.rope_theta,
            "max_position_embeddings": layer.max_position_embeddings,
            "num_target_layers": len(self.target.model.layers),
            "block_size": c.block_size,
            "dflash_config": {
                "mask_token_id": c.mask_token_id,
                "target_layer_ids": list(c.reads),
            },
            "layer_types": ["full_attention"] * len(head.layers),
        }
        save_published(path, settings, self._written(head), ids, c.vocab_size, dtype)


RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Recurrent, Medusa, Eagle3, DFlash)
}


def recipe_for(target: Target, options: HeadOptions) -> Recipe:
    """The recipe of the kind of head that is asked for."""
    return RECIPES[options.head](target, options)


def config_summary(config: Any) -> str:
    """A head's shape on one line, for its card."""
    values = dataclasses.asdict(config)
    return json.dumps({k: v for k, v in values.items() if v not in (None, False, ())}, default=str)


def frequent_ids(shards: Shards, most: int, vocab_size: int) -> np.ndarray:
    """The `most` token ids that were written most often, most frequent first; 0: all, in order."""
    if not most or most >= vocab_size:
        return np.arange(vocab_size)
    return np.argsort(-shards.counts(vocab_size), kind="stable")[:most]
