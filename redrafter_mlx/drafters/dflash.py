"""DFlash, DFlash 2 and DSpark: heads that fill in a block of tokens at once (see `block`).

It reads the files of z-lab, DeepSeek (DeepSpec) and speculators, which name tensors alike. All of
them use the target's own embedding and output layer.

Shape letters: P positions, R rows, B rows of a block, D draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import qwen3

from redrafter_mlx.drafters.attention import CHUNK
from redrafter_mlx.drafters.beams import BeamDrafter, Begun
from redrafter_mlx.drafters.block import (
    BlockConfig,
    BlockHead,
    BlockText,
    MarkovHead,
    Selector,
    Sight,
)
from redrafter_mlx.drafters.parallel import ParallelDrafter, ParallelSteps, Place
from redrafter_mlx.drafters.published import (
    Experiences,
    Kind,
    Shapes,
    agree,
    belongs_to,
    layer_settings,
    matrix,
    setting,
    targets_vocabulary,
    unwrapped,
)
from redrafter_mlx.drafters.text import SharedVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.rounds.round import Context, View
from redrafter_mlx.target.adapter import Target


class DFlashDrafter(ParallelDrafter):
    """Drafts with a BlockHead.

    embed  token ids (T,) -> (T, h), the target's
    view   what the head reads of what is captured of the target
    """

    readers = 1

    def __init__(self, head: BlockHead, vocabulary, embed, view: View, experience: Experiences):
        super().__init__(vocabulary, experience)
        self.head, self.embed, self.view = head, embed, view
        self.depths = head.config.depths
        self._text = BlockText(head, view)

    def fork(self, length: int) -> DFlashDrafter:
        other = super().fork(length)
        other._text = self._text.fork(length)
        return other

    def begin(self, context: Context) -> Begun:
        return self._begun(self._text.of(context.transcript, context.trail))

    def replayed(self, tokens: Sequence[int], hidden: mx.array, first: int) -> Begun:
        return self._begun(BlockText(self.head, self.view).of_whole(hidden, first))

    def _begun(self, memory: list[mx.array]) -> Begun:
        """The only thing known of a position is how much of the text it sees."""
        return memory[-1][:, None], memory

    def predict(
        self, begun: mx.array, memory: Sequence[mx.array], pending: mx.array, depths: int
    ) -> mx.array:
        """(depths, P, h) from a block after each position, a few blocks at a time."""
        first = 0 if self.head.config.next_token else 1
        at_once = max(1, CHUNK // self.head.config.block_size)
        *text, visible = memory
        found = [
            self.block(pending[p : p + at_once], [*text, visible[p : p + at_once]])
            for p in range(0, len(pending), at_once)
        ]
        return mx.concatenate(found).swapaxes(0, 1)[first : first + depths]

    def block(self, pending: mx.array, memory: Sequence[mx.array]) -> mx.array:
        """(P, B, h) hidden states of the blocks after P pending tokens."""
        config = self.head.config
        masks = mx.full((len(pending), config.block_size - 1), config.mask_token_id, pending.dtype)
        tokens = mx.concatenate([pending[:, None], masks], axis=1)
        embedded = self.embed(tokens.reshape(-1)).reshape(*tokens.shape, -1)
        return self.head(embedded * config.embedding_scale, memory)

    def project(self, outputs: mx.array, rows: dict) -> mx.array:
        config = self.head.config
        logits = super().project(outputs, rows) * config.multiplier
        return logits if config.cap is None else config.cap * mx.tanh(logits / config.cap)


@dataclass(frozen=True)
class LinkedPlace(Place):
    """R rows of drafts; read (R, r) and memory (R, r) or None, what a link has made of each."""

    read: mx.array
    memory: mx.array | None

    def __getitem__(self, rows: mx.array) -> LinkedPlace:
        memory = None if self.memory is None else self.memory[rows]
        return LinkedPlace(self.origins[rows], self.depth, self.read[rows], memory)


class LinkedSteps(ParallelSteps):
    """Steps through a block whose rows are linked to the tokens before them."""

    def __init__(self, predict, link: Selector | MarkovHead):
        super().__init__(predict)
        self._link = link

    def advance(self, state: LinkedPlace | None, tokens: mx.array) -> LinkedPlace:
        place = super().advance(state, tokens)
        memory = None if state is None else state.memory
        read, memory = self._link.read(self.outputs(place), tokens, memory)
        return LinkedPlace(place.origins, place.depth, read, memory)


class LinkedDrafter(DFlashDrafter):
    """Drafts by beam search, with a head that scores a token by the one before."""

    def __init__(self, head: BlockHead, *others):
        super().__init__(head, *others)
        self.choices = head.config.candidates or math.inf

    def steps(self, begun: mx.array, memory: Sequence[mx.array]) -> LinkedSteps:
        predict = partial(self.predict, begun, memory, depths=self.depths)
        return LinkedSteps(predict, self.head.link)

    def logits(self, steps: LinkedSteps, state: LinkedPlace, rows: dict) -> mx.array:
        each = steps.logits(state.depth, lambda outputs: self.project(outputs, rows))
        scores = self.head.link.scores(each, state.origins, state.read)
        return scores.astype(mx.float32)

    # a beam search, instead of the products of a ParallelDrafter
    likeliest, candidates = BeamDrafter.likeliest, BeamDrafter.candidates


RENAMED = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
PARAMETERS = ("fc.", "hidden_norm.", "norm.", "layers.", "candidate_selector.", "markov_head.")
COPIES = "a copy of the target's own, frozen in training"
CONFIDENCE = "how much of a draft is worth verifying is learnt from earlier drafts"
UNUSED = {
    "t2d": "d2t says the same",
    "embed_tokens.weight": COPIES,
    "lm_head.weight": COPIES,
    "verifier_lm_head.weight": COPIES,
    "verifier_norm.weight": COPIES,
    "confidence_head.proj.weight": CONFIDENCE,
    "confidence_head.proj.bias": CONFIDENCE,
}


def _known(name: str) -> str | None:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name if name.startswith(PARAMETERS) or name == "d2t" or name in UNUSED else None


def _ours(names: Collection[str]) -> dict[str, str]:
    return unwrapped(names, _known)


def _recognises(settings: Mapping[str, Any], names: Collection[str]) -> bool:
    ours = set(_ours(names).values())
    return {"fc.weight", "hidden_norm.weight", "layers.0.self_attn.q_norm.weight"} <= ours


def _settings(where: object, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All on one level: z-lab nests what is not Qwen3's in dflash_config, speculators what is."""
    found = dict(settings)
    for key in ("transformer_layer_config", "dflash_config"):
        nested = settings.get(key) or {}
        if not isinstance(nested, Mapping):
            raise UserError(f"{where}: {key} is {nested!r}, not an object")
        found |= {name: value for name, value in nested.items() if value is not None}
    return found


def _layer(where: object, settings: Mapping[str, Any], shapes: Shapes) -> qwen3.ModelArgs:
    """mlx-lm's ModelArgs of the layers."""
    given = layer_settings(where, settings, shapes)
    agree(where, "head_dim", settings.get("head_dim"), given["head_dim"])
    eps = _number(where, settings, "rms_norm_eps", 1e-6)
    return qwen3.ModelArgs(model_type="qwen3", rms_norm_eps=eps, **given)


def _number(where: object, settings: Mapping[str, Any], key: str, default: float) -> float:
    """A number of at least 0 in config.json."""
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where}: {key} is {value!r}, not a number of at least 0")
    return float(value)


def _reads(where: object, settings: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers whose outputs are read; speculators number the boundaries between layers."""
    ids, shift = settings.get("target_layer_ids"), 0
    if ids is None and settings.get("aux_hidden_state_layer_ids") is not None:
        ids, shift = settings["aux_hidden_state_layer_ids"], 1
    if ids is None and settings.get("num_target_layers") is not None:
        ids = _spread(setting(where, settings, "num_target_layers"), layers)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise UserError(f"{where}: target_layer_ids is {ids!r}, not layer numbers")
    return tuple(i - shift for i in ids)


def _spread(target_layers: int, layers: int) -> list[int]:
    """Evenly spread layers: z-lab's first heads read these, and config.json does not say so."""
    if layers == 1:
        return [target_layers // 2]
    return [round(i) for i in np.linspace(1, target_layers - 3, layers).tolist()]


def _sights(where: object, settings: Mapping[str, Any], layers: int) -> tuple[Sight, ...]:
    """What each layer sees: those with a window are causal unless config.json says otherwise."""
    types = settings.get("layer_types") or ["full_attention"] * layers
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= known:
        raise UserError(f"{where}: layer_types is {types!r} for {layers} layers")
    causal = settings.get("is_causal", settings.get("causal"))
    if causal is None and settings.get("sliding_window_non_causal"):
        causal = False
    found = []
    for kind in types:
        slides = kind == "sliding_attention"
        window = setting(where, settings, "sliding_window") if slides else None
        found.append(Sight(window, slides if causal is None else bool(causal)))
    return tuple(found)


def _link(where: object, settings: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Fields of a BlockConfig that say how neighbours are linked."""
    if "markov_head.markov_w1.weight" in shapes:
        kind = settings.get("markov_head_type") or "vanilla"
        if kind not in MarkovHead.KINDS:
            raise UserError(
                f"{where}: markov_head_type is {kind!r}, not one of {', '.join(MarkovHead.KINDS)}"
            )
        rank = matrix(where, shapes, "markov_head.markov_w1.weight")[1]
        agree(where, "markov_rank", settings.get("markov_rank"), rank)
        return {"markov": kind, "rank": rank}
    codebook = "candidate_selector.predecessor_codebook"
    if codebook in shapes:
        rank = matrix(where, shapes, codebook)[1]
        agree(where, "selector_rank", settings.get("selector_rank"), rank)
        candidates = setting(where, settings, "selector_top_k")
        successors = matrix(where, shapes, "candidate_selector.successor_codebook")[0]
        return {"rank": rank, "candidates": min(candidates, successors)}
    return {}


def _convolutions(where: object, settings: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Fields of a BlockConfig that say what its convolutions are."""
    if "layers.0.attention_conv.base_kernel" not in shapes:
        return {}
    hidden_size = matrix(where, shapes, "layers.0.attention_conv.kernel_projection.weight")[1]
    taps = setting(where, settings, "conv_kernel_size")
    group = setting(where, settings, "conv_group_size")
    if hidden_size % group:
        raise UserError(f"{where}: conv_group_size is {group}, no part of {hidden_size}")
    return {"conv_taps": taps, "conv_group": group}


def _predicts_next(settings: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether rows predict the token after them, as all of DeepSpec's do, DFlash or not."""
    given = settings.get("sample_from_anchor")
    if given is not None:
        return bool(given)
    named = [*(settings.get("architectures") or []), settings.get("speculators_model_type")]
    return "markov_head.markov_w1.weight" in shapes or any(
        "dspark" in str(n).lower() for n in named
    )


def _config(where: object, settings: Mapping[str, Any], shapes: Shapes) -> BlockConfig:
    settings = _settings(where, settings)
    layer = _layer(where, settings, shapes)
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    agree(where, "num_hidden_layers", settings.get("num_hidden_layers"), layers)
    reads = _reads(where, settings, layers)
    columns = matrix(where, shapes, "fc.weight")[1]
    agree(where, "the width of target_layer_ids", len(reads) * layer.hidden_size, columns)
    vocab_size = setting(where, settings, "vocab_size")
    mask = settings.get("mask_token_id")
    if type(mask) is not int or not 0 <= mask < vocab_size:
        raise UserError(f"{where}: mask_token_id is {mask!r}, not a token id below {vocab_size}")
    block_size = setting(where, settings, "block_size", 16)
    number = partial(_number, where, settings)
    next_token = _predicts_next(settings, shapes)
    if block_size < 2 - next_token:
        raise UserError(f"{where}: block_size is {block_size}: a block predicts nothing")
    return BlockConfig(
        layer=layer,
        sights=_sights(where, settings, layers),
        reads=reads,
        vocab_size=vocab_size,
        draft_vocab_size=setting(where, settings, "draft_vocab_size", vocab_size),
        block_size=block_size,
        mask_token_id=mask,
        next_token=next_token,
        biased="layers.0.self_attn.q_proj.bias" in shapes,
        interleaved=not settings.get("rope_is_neox_style", settings.get("is_neox_style", True)),
        embedding_scale=number("input_embedding_scale", 1.0),
        multiplier=number("output_multiplier", 1.0),
        cap=number("final_logit_softcapping", 0.0) or None,
        **_link(where, settings, shapes),
        **_convolutions(where, settings, shapes),
    )


def _drafter(
    target: Target, head: BlockHead, ids: np.ndarray, experience: Experiences
) -> DFlashDrafter:
    config = head.config
    belongs_to(target, config.layer.hidden_size, config.vocab_size)
    view = target.tap(config.reads, final=False, whole_text=True)
    vocabulary = targets_vocabulary(target, ids)
    if head.link is not None and len(ids) < target.vocab_size:  # it can link no ids but these
        d2t = mx.array(ids.astype(np.int32))
        vocabulary = SharedVocabulary(d2t, target.output_layer(d2t))
    kind = DFlashDrafter if head.link is None else LinkedDrafter
    return kind(head, vocabulary, target.embed, view, experience)


def _outputs(config: BlockConfig) -> tuple[str, ...] | None:
    """None for a Selector, whose candidates are among all ids."""
    if config.candidates:
        return None
    return ("markov_head.markov_w2",) if config.markov else ()


KIND = Kind(
    name="dflash",
    about="a block of tokens at once: DFlash, DFlash 2, DSpark (z-lab, DeepSeek, speculators)",
    recognises=_recognises,
    ours=_ours,
    config=_config,
    head=BlockHead,
    drafter=_drafter,
    outputs=_outputs,
    unused=UNUSED,
)
