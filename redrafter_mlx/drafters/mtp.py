"""The multi-token-prediction head that lies inside a target's original checkpoint.

It is one more decoder layer of the target's own kind, before which a token's embedding and the
hidden state before it are joined (arXiv 2412.19437, 2.2). mlx-lm reads past it, but has that kind
of layer: the layer here is the only one of an mlx-lm model made for it, of which nothing else is
ever computed.

Of several such heads the first is used for every depth, as vLLM and SGLang do with one. Copies of
the target's embedding and output layer that some bring are not read: the target's own are used.

Shape letters: T tokens, S places, h hidden size, V vocabulary, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from redrafter_mlx.drafters.attention import AttentionDrafter, AttentionHead
from redrafter_mlx.drafters.published import (
    Experiences,
    Kind,
    Shapes,
    belongs_to,
    setting,
    targets_vocabulary,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.rope import accept_row_offsets, takes_offset

BLOCK = (128, 128)
"""Rows and columns of FP8 weights that share a scale, where config.json does not say."""


@dataclass(frozen=True)
class Family:
    """Where the head lies in the checkpoints of some model types, and how it computes.

    model_types   mlx-lm's
    place         pattern of what stands before the names of all its tensors
    parts         our names of its modules beside the layer -> theirs
    layer         what stands before the names of the layer's tensors, after `place`
    settings      with which the only layer of an mlx-lm model is of the head's kind
    hidden_first  whether the hidden state is joined before the embedding
    centred       whether the weights of norms are what they differ from one by
    dropped       what names of tensors begin with that are copies of the target's
    """

    model_types: tuple[str, ...]
    place: str
    parts: Mapping[str, str]
    layer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    hidden_first: bool = False
    centred: bool = False
    dropped: tuple[str, ...] = ()


FAMILIES = (
    Family(
        model_types=("qwen3_next", "qwen3_5", "qwen3_5_moe"),
        place=r"(.+\.)?mtp\.|",  # nothing: as mlx-vlm takes it out
        parts={
            "fc": "fc",
            "norm_embedding": "pre_fc_norm_embedding",
            "norm_hidden": "pre_fc_norm_hidden",
            "norm": "norm",
        },
        layer="layers.0.",
        settings={"full_attention_interval": 1, "mlp_only_layers": [], "decoder_sparse_step": 1},
        centred=True,
    ),
    Family(
        model_types=("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        place=r"(.+\.)?layers\.\d+\.",
        parts={
            "fc": "eh_proj",
            "norm_embedding": "enorm",
            "norm_hidden": "hnorm",
            "norm": "shared_head.norm",
        },
        settings={"first_k_dense_replace": 0},
        dropped=("embed_tokens.", "shared_head.head."),
    ),
    Family(
        model_types=("mimo",),
        place=r"(.+\.)?mtp_layers\.0\.",
        parts={
            "fc": "input_proj",
            "norm_embedding": "token_layernorm",
            "norm_hidden": "hidden_layernorm",
            "norm": "final_layernorm",
        },
        hidden_first=True,
    ),
    Family(
        model_types=("ernie4_5_moe",),
        place=r"(.+\.)?",
        parts={
            "fc": "mtp_linear_proj.0",
            "norm_embedding": "mtp_emb_norm.0",
            "norm_hidden": "mtp_hidden_norm.0",
        },
        layer="mtp_block.0.",
        settings={"moe_layer_end_index": -1},  # a dense layer
    ),
)


@dataclass(frozen=True)
class MTPConfig:
    """The shape of a head.

    where   for messages
    model   mlx-lm's, with one layer, never evaluated
    caches  how many caches the layer takes; more than one as a list
    block   rows and columns of FP8 weights that share a scale
    """

    where: object
    family: Family
    model: nn.Module
    caches: int
    vocab_size: int
    draft_vocab_size: int
    block: tuple[int, int]

    @property
    def layer(self) -> nn.Module:
        return self.model.layers[0]

    @property
    def hidden_size(self) -> int:
        return self.layer.input_layernorm.weight.size


class MTPHead(AttentionHead):
    """Predicts the next token from a token and the hidden state before it; see `AttentionHead`."""

    def __init__(self, config: MTPConfig):
        super().__init__()
        self.config, h = config, config.hidden_size
        eps = config.layer.input_layernorm.eps
        self.norm_embedding, self.norm_hidden = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)
        self.fc = nn.Linear(2 * h, h, bias=False)
        self.layer = config.layer
        if "norm" in config.family.parts:
            self.norm = nn.RMSNorm(h, eps)
        for module in filter(takes_offset, self.layer.modules()):
            accept_row_offsets(module)

    @property
    def caches(self) -> int:
        return self.config.caches

    def read(self, captured: mx.array) -> mx.array:
        return captured

    def __call__(self, embedded: mx.array, hidden: mx.array, mask, caches: Sequence) -> mx.array:
        joined = [self.norm_embedding(embedded), self.norm_hidden(hidden)]
        if self.config.family.hidden_first:
            joined.reverse()
        if isinstance(mask, str):  # latent attention computes with it
            mask = create_causal_mask(hidden.shape[1], caches[0].offset)
        if mask is not None:
            mask = mask[None, None]
        hidden = self.fc(mx.concatenate(joined, axis=-1))
        hidden = self.layer(hidden, mask, list(caches) if len(caches) > 1 else caches[0])
        return self.norm(hidden) if "norm" in self else hidden

    def outputs(self, hidden: mx.array) -> mx.array:
        return hidden

    def casts(self, name: str) -> bool:
        """Whether a tensor is computed with in the target's type; a router's bias may not be."""
        return getattr(self.config.model, "cast_predicate", lambda name: True)(name)


def _found(names: Collection[str]) -> tuple[Family, str] | None:
    """The family whose names these are, and what stands before those of its first head."""
    number = lambda place: [int(digits) for digits in re.findall(r"\d+", place)]
    for family in FAMILIES:
        last = re.escape(family.parts["norm_hidden"])
        pattern = re.compile(rf"({family.place}){last}\.weight")
        places = [found[1] for name in names if (found := pattern.fullmatch(name))]
        if places:
            return family, min(places, key=number)
    return None


def _ours(names: Collection[str]) -> dict[str, str]:
    family, place = _found(names) or (None, "")
    found = {}
    for theirs in names if family else ():
        if theirs == "d2t":
            found[theirs] = theirs
        elif theirs.startswith(place) and (ours := _our_name(family, theirs[len(place) :])):
            found[theirs] = ours
    return found


def _our_name(family: Family, name: str) -> str | None:
    for ours, theirs in family.parts.items():
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    if name.startswith(family.dropped) or name.endswith(".rotary_emb.inv_freq"):
        return None
    return f"layer.{name[len(family.layer) :]}" if name.startswith(family.layer) else None


def _text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, which those of one that sees nest; speculators', too."""
    nested = (settings.get(key) for key in ("text_config", "transformer_layer_config"))
    return next((text for text in nested if isinstance(text, Mapping)), settings)


def _model_type(settings: Mapping[str, Any]) -> str:
    told = _text(settings).get("model_type") or settings.get("model_type")
    told = str(told).removesuffix("_text")
    return MODEL_REMAPPING.get(told, told)


def _alone(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = settings.keys() & {"quantization", "quantization_config", "draft_vocab_size"}
    kept = {key: settings[key] for key in sorted(keys)}
    return {**_text(settings), **kept, "model_type": _model_type(settings)}


def _config(where: object, settings: Mapping[str, Any], shapes: Shapes) -> MTPConfig:
    kind, text = _model_type(settings), _text(settings)
    family = next((family for family in FAMILIES if kind in family.model_types), None)
    if family is None:
        known = ", ".join(sorted(name for each in FAMILIES for name in each.model_types))
        raise UserError(
            f"{where}: holds the multi-token-prediction head of a {kind!r} model, and how that "
            f"computes is not known here; it is of {known}"
        )
    model = _model(where, {**text, **family.settings, "model_type": kind, "num_hidden_layers": 1})
    cache = make_prompt_cache(model)[0]
    vocab_size = setting(where, text, "vocab_size")
    return MTPConfig(
        where=where,
        family=family,
        model=model,
        caches=len(cache.caches) if isinstance(cache, CacheList) else 1,
        vocab_size=vocab_size,
        draft_vocab_size=setting(where, settings, "draft_vocab_size", vocab_size),
        block=_block(where, settings),
    )


def _model(where: object, settings: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model of these settings. Nothing is evaluated, so it takes up no memory."""
    try:
        model_class, args_class = _get_classes(settings)
        return model_class(args_class.from_dict(deepcopy(settings)))
    except Exception as error:  # whatever a model file raises
        raise UserError(
            f"{where}: config.json does not describe a {settings['model_type']} model: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _block(where: object, settings: Mapping[str, Any]) -> tuple[int, int]:
    packing = settings.get("quantization_config") or _text(settings).get("quantization_config")
    block = packing.get("weight_block_size") if isinstance(packing, Mapping) else None
    block = list(BLOCK) if block is None else block
    is_size = lambda size: type(size) is int and size > 0
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        raise UserError(f"{where}: weight_block_size is {block!r}, not two sizes")
    return tuple(block)


def _ready(head: MTPHead, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights as mlx-lm's layer has them, from those that are published."""
    config = head.config
    try:
        weights = _stacked(config.where, _unscaled(weights, config.block))
        norms = {name: x for name, x in weights.items() if name.endswith("norm.weight")}
        norms |= {name: x for name, x in weights.items() if name.startswith("norm_")}
        others = {name: x for name, x in weights.items() if name not in norms}
        if config.family.centred:
            norms = _shifted(norms)
        return norms | _sanitized(config, others)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{config.where}: the tensors of the head do not fit together: {reason}"
        ) from error


def _unscaled(weights: Mapping[str, mx.array], block: tuple[int, int]) -> dict[str, mx.array]:
    """FP8 weights, of which each block has a scale, as numbers."""
    found = {}
    for name, x in weights.items():
        scale = weights.get(f"{name}_scale_inv")
        if scale is not None:
            for axis, size in zip((-2, -1), block, strict=True):
                scale = mx.repeat(scale, size, axis)
            rows, columns = x.shape[-2:]
            scale = scale[..., :rows, :columns].astype(mx.float32)
            x = (mx.from_fp8(x, mx.float32) * scale).astype(mx.bfloat16)
        if not name.endswith("_scale_inv"):
            found[name] = x
    return found


def _stacked(where: object, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Experts as one tensor (E, ...) of each matrix: published one by one, or gate and up fused.

    mlx-lm knows how the target's are published; the head's may be the other way.
    """
    found: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, x in weights.items():
        if one := re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)", name):
            experts.setdefault(f"{one[1]}.switch_mlp.{one[3]}", {})[int(one[2])] = x
        elif name.endswith(".experts.gate_up_proj"):
            place = name.removesuffix("experts.gate_up_proj") + "switch_mlp"
            gate, up = mx.split(x, 2, axis=-2)
            found |= {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            found[name.replace(".experts.down_proj", ".switch_mlp.down_proj.weight")] = x
        else:
            found[name] = x
    for name, each in experts.items():
        numbers = sorted(each)
        if numbers[-1] >= len(numbers):
            missing = next(i for i, number in enumerate(numbers) if i != number)
            raise UserError(f"{where}: lacks {name} of expert {missing}")
        found[name] = mx.stack([each[number] for number in numbers])
    return found


def _shifted(norms: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Norms' weights as factors: what is published is what they differ from one by.

    Some that made MLX checkpoints added the one, to all norms or to a part of them, and do not
    say so. Means tell: near one or near zero. Only the two norms before `fc` damp, to means of
    0.3 to 0.5 as factors; they are what the layer's own first norm is.
    """
    means = device.read(*(x.astype(mx.float32).mean() for x in norms.values()))
    is_factor = {name: bool(mean > 0.5) for name, mean in zip(norms, means, strict=True)}
    first = is_factor.get("layer.input_layernorm.weight", False)
    is_factor |= {name: first for name in norms if name.startswith("norm_")}
    return {name: x if is_factor[name] else x + 1 for name, x in norms.items()}


def _sanitized(config: MTPConfig, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What the model's own `sanitize` makes of the layer's tensors, such as of `kv_b_proj`."""
    modules = config.model.named_modules()
    place = next(name for name, module in modules if module is config.layer)
    ours = {name: x for name, x in weights.items() if not name.startswith("layer.")}
    layer = {place + name[5:]: x for name, x in weights.items() if name not in ours}
    if hasattr(config.model, "sanitize"):
        layer = config.model.sanitize(layer)
    return ours | {f"layer{name.removeprefix(place)}": x for name, x in layer.items()}


def _drafter(
    target: Target, head: MTPHead, ids: np.ndarray, experience: Experiences
) -> AttentionDrafter:
    config = head.config
    belongs_to(target, config.hidden_size, config.vocab_size)
    vocabulary = targets_vocabulary(target, ids)
    view = target.tap((), whole_text=True)
    return AttentionDrafter(head, vocabulary, target.embed, view, experience)


KIND = Kind(
    name="mtp",
    about="the multi-token-prediction layer inside a target's original checkpoint",
    recognises=lambda settings, names: _found(names) is not None,
    ours=_ours,
    config=_config,
    head=MTPHead,
    drafter=_drafter,
    vocabulary=lambda config: (config.vocab_size, config.draft_vocab_size),
    outputs=lambda config: (),
    inside=True,
    ready=_ready,
    alone=_alone,
)
