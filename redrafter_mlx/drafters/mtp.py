"""The multi-token-prediction head that lies inside a target's original checkpoint.

It is one more decoder layer of the target's own kind, before which a token's embedding and the
hidden state before it are joined (arXiv 2412.19437, 2.2). mlx-lm skips it when it loads the target,
but has that kind of layer: the layers here belong to an mlx-lm model made for this, of which
nothing else is ever computed. Some heads bring copies of the target's embedding and output layer;
the target's own are used instead.

Shape letters: T tokens, S places, R rows of a draft, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.utils import _get_classes

from redrafter_mlx.drafters.attention import (
    AttentionDrafter,
    AttentionHead,
    OneStateHead,
    Sees,
    TextKeys,
)
from redrafter_mlx.drafters.mtp_families import (
    FAMILIES,
    Family,
    alone,
    found_in,
    model_type_of,
    ours,
    text_of,
)
from redrafter_mlx.drafters.mtp_weights import MTPConfig, ready
from redrafter_mlx.drafters.published import (
    Experiences,
    Kind,
    Shapes,
    belongs_to,
    setting,
    targets_vocabulary,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.rope import accept_row_offsets, takes_offset

BLOCK = (128, 128)
"""Rows and columns of FP8 weights that share a scale, where config.json does not say."""


class MTPHead(OneStateHead):
    """Predicts the next token from a token and the hidden state before it; see `OneStateHead`."""

    def __init__(self, config: MTPConfig, depth: int = 0):
        super().__init__()
        self.config, h = config, config.hidden_size
        eps = config.first_norm.eps
        self.norm_embedding, self.norm_hidden = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)
        self.fc = nn.Linear(2 * h, h, bias=False)
        layers = list(config.layers(depth).values())
        self.layer = layers[0] if len(layers) == 1 else layers
        if "norm" in config.family.parts:
            self.norm = nn.RMSNorm(h, eps)
        for layer in layers:
            for module in filter(takes_offset, layer.modules()):
                accept_row_offsets(module)

    @property
    def caches(self) -> int:
        return self.config.caches

    def __call__(self, embedded: mx.array, hidden: mx.array, mask, caches: Sequence) -> mx.array:
        joined = [self.norm_embedding(embedded), self.norm_hidden(hidden)]
        if self.config.family.hidden_first:
            joined.reverse()
        if isinstance(mask, str):  # latent attention computes with it
            mask = create_causal_mask(hidden.shape[1], caches[0].offset)
        if mask is not None:
            mask = mask[None, None]
        hidden = self.fc(mx.concatenate(joined, axis=-1))
        cache = list(caches) if len(caches) > 1 else caches[0]
        for layer in self.layer if isinstance(self.layer, list) else [self.layer]:
            hidden = layer(hidden, mask, cache)
        return self.norm(hidden) if "norm" in self else hidden

    def casts(self, name: str) -> bool:
        """Whether a tensor is computed with in the target's type; a router's bias may not be."""
        return getattr(self.config.model, "cast_predicate", lambda name: True)(name)


class MTPHeads(AttentionHead):
    """A head for each depth: head k predicts the k-th token after the next (arXiv 2412.19437, 2.2).

    At a token head k reads the state that head k - 1 has made of the token before, in the text as
    in a draft; only the first reads the target's. So k of these heads can be used k deep. Beyond
    them the last goes on by its own states, as a single head does; vLLM begins again with the
    first one, which never learnt to read its own states (deepseek_mtp.py at 03356f8c:
    `spec_step_idx % num_mtp_layers`). States are passed on after a head's last norm, as
    Megatron-LM trains it (multi_token_prediction.py at 00611e6e, `_postprocess`).

    All heads have a place for each token, so place m of every cache belongs to the token m + 1. The
    first k of head k, counted from 0, would read states from before the text, so they are masked.

    A row's state (R, depths · h) is that of each head, side by side.
    """

    recalls = True

    def __init__(self, config: MTPConfig):
        super().__init__()
        self.config = config
        self.depths = [MTPHead(config, depth) for depth in range(config.depths)]

    @property
    def caches(self) -> int:
        return self.config.caches * self.config.depths

    def over(
        self, embedded: mx.array, read: mx.array, before: mx.array | None, caches: Sequence
    ) -> mx.array:
        found, (rows, h) = [], read.shape
        for depth, head in enumerate(self.depths):
            if depth:
                first = slice((depth - 1) * h, depth * h)
                last = mx.zeros_like(read[:1]) if before is None else before[:, first]
                read = mx.concatenate([last, found[-1][:-1]])
            own = self._of(caches, depth)
            mask = "causal" if rows > 1 else None
            if depth:
                mask = _later(own[0].offset, rows, depth)
            found.append(head(embedded[None], read[None], mask, own)[0])
        return mx.concatenate(found, axis=-1)

    def step(
        self, embedded: mx.array, states: mx.array, depth: int, sees: Sees, caches: Sequence
    ) -> mx.array:
        before = mx.split(states, self.config.depths, axis=-1)
        found, last = list(before), self.config.depths - 1
        reads = {k: before[k - 1] for k in range(depth, last + 1)} or {last: before[last]}
        for k, read in reads.items():
            found[k] = self.depths[k](embedded[None], read[None], sees(k), self._of(caches, k))[0]
        return mx.concatenate(found, axis=-1)

    def predicting(self, states: mx.array, depth: int) -> mx.array:
        return mx.split(states, self.config.depths, axis=-1)[min(depth, self.config.depths - 1)]

    def casts(self, name: str) -> bool:
        return self.depths[0].casts(name)

    def _of(self, caches: Sequence, depth: int) -> Sequence:
        return caches[depth * self.config.caches : (depth + 1) * self.config.caches]


def _later(offset: int, rows: int, first: int) -> mx.array:
    """Causal mask (T, S + T) in which all but a row itself sees no place before the `first`."""
    places, here = mx.arange(offset + rows), mx.arange(offset, offset + rows)[:, None]
    return ((places >= first) & (places <= here)) | (places == here)


def _config(where: object, settings: Mapping[str, Any], shapes: Shapes) -> MTPConfig:
    kind, text = model_type_of(settings), text_of(settings)
    family = next((family for family in FAMILIES if kind in family.model_types), None)
    if family is None:
        if not kind:
            raise UserError(
                f"{where}: holds a multi-token-prediction head, and no config.json with a "
                "model_type says of which model; put that of its target there"
            )
        known = ", ".join(sorted(name for each in FAMILIES for name in each.model_types))
        raise UserError(
            f"{where}: holds the multi-token-prediction head of a {kind!r} model, and how that "
            f"computes is not known here; it is of {known}"
        )
    _check_blocks(where, text, shapes, family)
    depths = len({name.split(".")[1] for name in shapes if name.startswith("depths.")}) or 1
    one_kind = {**family.settings, "model_type": kind, "num_hidden_layers": depths}
    model = _model(where, {**text, **one_kind})
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
        depths=depths,
    )


def _check_blocks(where: object, text: Mapping[str, Any], shapes: Shapes, family: Family) -> None:
    """UserError for a head of other blocks than its family's, or of more."""
    if family.blocks == 1:
        return
    kinds = {"*": ("*", "attention", "full_attention"), "E": ("E", "moe")}
    known = family.settings["hybrid_override_pattern"]
    told = text.get("mtp_layers_block_type") or text.get("mtp_hybrid_override_pattern") or known
    if len(told) != len(known) or any(
        theirs not in kinds[ours] for theirs, ours in zip(told, known, strict=True)
    ):
        raise UserError(
            f"{where}: the blocks of its multi-token-prediction head are {told!r}; only attention "
            "and then experts ('*E') are known here"
        )
    more = sorted(name for name in shapes if name.startswith(f"layer.{family.blocks}."))
    if more:
        raise UserError(
            f"{where}: holds several multi-token-prediction heads ({more[0]}); of a "
            f"{family.model_types[0]} model only one is known here"
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
    packing = settings.get("quantization_config") or text_of(settings).get("quantization_config")
    block = packing.get("weight_block_size") if isinstance(packing, Mapping) else None
    block = list(BLOCK) if block is None else block
    is_size = lambda size: type(size) is int and size > 0
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        raise UserError(f"{where}: weight_block_size is {block!r}, not two sizes")
    return tuple(block)


def _head(config: MTPConfig) -> MTPHead | MTPHeads:
    """The module; one token is traced (nothing is evaluated), as some settings matter only then."""
    head = MTPHead(config) if config.depths == 1 else MTPHeads(config)
    state = mx.zeros((1, config.hidden_size))
    head.over(state, state, None, [TextKeys() for _ in range(head.caches)])
    return head


def _ready(head: MTPHead | MTPHeads, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights by the names of our modules; each depth has those that several share."""
    config = head.config
    if config.depths == 1:
        return ready(config, 0, weights)
    found, first = {}, {}
    for depth in range(config.depths):
        place = f"depths.{depth}."
        own = {n.removeprefix(place): x for n, x in weights.items() if n.startswith(place)}
        shared = config.family.shares
        first = first or {n: x for n, x in own.items() if n.startswith(shared) and shared}
        found |= {place + n: x for n, x in ready(config, depth, first | own).items()}
    return found


def _drafter(
    target: Target, head: MTPHead | MTPHeads, ids: np.ndarray, experience: Experiences
) -> AttentionDrafter:
    config = head.config
    belongs_to(target, config.hidden_size, config.vocab_size)
    vocabulary = targets_vocabulary(target, ids)
    view = target.tap((), whole_text=True)
    return AttentionDrafter(head, vocabulary, target.embed, view, experience)


KIND = Kind(
    name="mtp",
    about="the multi-token-prediction layer inside a target's original checkpoint",
    recognises=lambda settings, names: found_in(names) is not None,
    ours=ours,
    config=_config,
    head=_head,
    drafter=_drafter,
    outputs=lambda config: (),
    inside=True,
    ready=_ready,
    alone=alone,
)
