"""EAGLE-3: one decoder layer that reads three of the target's layers (arXiv 2503.01840).

It reads the files of SafeAILab, SpecForge and NVIDIA (`midlayer.*`, a flat config.json) and those
of speculators (`layers.0.*`, the layer's shape under `transformer_layer_config`).

Shape letters: T tokens, h hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama, qwen3

from redrafter_mlx.drafters.attention import AttentionDrafter, OneStateHead
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
from redrafter_mlx.drafters.text import OwnVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.rope import accept_row_offsets

SAME = 0.98
"""Cosine from which on rows of two embeddings count as the same but for rounding."""


@dataclass(frozen=True)
class Eagle3Config:
    """The shape of an EAGLE-3 head.

    layer               mlx-lm's ModelArgs of its layers
    layers              how many there are
    target_hidden_size  of what it reads
    reads               layers of the target whose outputs it reads; None: by the target's depth
    captured            how many these are
    own_embedding       whether it brings its own
    own_output          whether it brings its own output layer
    normed_residual     whether the layer's residual is the normed input (norm_before_residual)
    norm_input          one norm of all it reads, before `fc`
    norm_each           a norm of each layer it reads, before `fc`
    norm_fed_back       whether it goes on from the normed state (norm_output)
    """

    layer: llama.ModelArgs | qwen3.ModelArgs
    layers: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    reads: tuple[int, ...] | None
    captured: int = 3
    own_embedding: bool = False
    own_output: bool = True
    normed_residual: bool = False
    norm_input: bool = False
    norm_each: bool = False
    norm_fed_back: bool = False

    @property
    def hidden_size(self) -> int:
        return self.layer.hidden_size


class Layer(nn.Module):
    """A decoder layer; the `first` attends with the token's embedding beside the hidden state."""

    def __init__(self, config: Eagle3Config, first: bool):
        super().__init__()
        args, h = config.layer, config.hidden_size
        family = qwen3 if isinstance(args, qwen3.ModelArgs) else llama
        self.self_attn = family.Attention(args)
        accept_row_offsets(self.self_attn.rope)
        self.mlp = qwen3.MLP(h, args.intermediate_size) if family is qwen3 else llama.MLP(args)
        self.input_layernorm = nn.RMSNorm(h, args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(h, args.rms_norm_eps)
        if first:
            self.hidden_norm = nn.RMSNorm(h, args.rms_norm_eps)
            for name in ("q_proj", "k_proj", "v_proj"):
                made = self.self_attn[name]
                self.self_attn[name] = nn.Linear(2 * h, len(made.weight), "bias" in made)
        self._normed_residual = config.normed_residual

    def __call__(self, hidden: mx.array, mask, cache, embedded: mx.array | None = None):
        if embedded is None:
            given = self.input_layernorm(hidden)
        else:
            normed = self.hidden_norm(hidden)
            given = mx.concatenate([self.input_layernorm(embedded), normed], axis=-1)
            hidden = normed if self._normed_residual else hidden
        hidden = hidden + self.self_attn(given, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(OneStateHead):
    """Predicts the next token from a token and the hidden state before it; see `OneStateHead`."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config, h, eps = config, config.hidden_size, config.layer.rms_norm_eps
        self.fc = nn.Linear(config.captured * config.target_hidden_size, h, bias=False)
        self.layers = [Layer(config, first=i == 0) for i in range(config.layers)]
        self.norm = nn.RMSNorm(h, eps)
        if config.own_output:
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, h)
        if config.norm_input:
            self.input_norm = nn.RMSNorm(config.captured * config.target_hidden_size, eps)
        if config.norm_each:
            sizes = [config.target_hidden_size] * config.captured
            self.fc_norm = [nn.RMSNorm(size, eps) for size in sizes]

    @property
    def caches(self) -> int:
        return len(self.layers)

    def read(self, captured: mx.array) -> mx.array:
        if self.config.norm_input:
            captured = self.input_norm(captured)
        if self.config.norm_each:
            parts = mx.split(captured, self.config.captured, axis=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            captured = mx.concatenate(normed, axis=-1)
        return self.fc(captured)

    def __call__(self, embedded: mx.array, hidden: mx.array, mask, caches: Sequence) -> mx.array:
        first, *others = zip(self.layers, caches, strict=True)
        hidden = first[0](hidden, mask, first[1], embedded)
        for layer, cache in others:
            hidden = layer(hidden, mask, cache)
        return self.norm(hidden) if self.config.norm_fed_back else hidden

    def normed(self, hidden: mx.array) -> mx.array:
        """What the output layer reads (..., h)."""
        return hidden if self.config.norm_fed_back else self.norm(hidden)

    def outputs(self, hidden: mx.array) -> mx.array:
        normed = self.normed(hidden)
        return self.lm_head(normed) if self.config.own_output else normed


def reads_by_default(layers: int) -> tuple[int, ...]:
    """The target's layers that every trainer captures unless told otherwise, of so many.

    SafeAILab takes the inputs of layers 2, n / 2 and n - 3: the outputs of those before.
    """
    return tuple(max(place - 1, 0) for place in (2, layers // 2, layers - 3))


def reads_of(where: object, settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The layers whose outputs config.json says that a head reads, in ascending order.

    Ids count boundaries between layers, as vLLM and speculators have them: i is the input of layer
    i. SpecForge, SGLang and most of NVIDIA's mean the output of layer i, and begin with 1; NVIDIA's
    for gpt-oss are boundaries and begin with another. So the first id tells (REFERENCES: who means
    what). Raises UserError for values that are not layers.
    """
    nested = settings.get("eagle_config")
    ids = settings.get("eagle_aux_hidden_state_layer_ids")
    if ids is None and isinstance(nested, Mapping):
        ids = nested.get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i > 0 for i in ids):
        raise UserError(f"{where}: eagle_aux_hidden_state_layer_ids is {ids!r}, not layer numbers")
    ids = sorted(set(ids))
    return tuple(ids) if ids[0] == 1 else tuple(i - 1 for i in ids)


PARAMETERS = ("fc.", "norm.", "lm_head.", "embed_tokens.", "input_norm.", "fc_norm.", "layers.")


def _known(name: str) -> str | None:
    name = name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name
    is_ours = name.startswith(PARAMETERS) or name in ("d2t", "t2d")
    return name if is_ours and not name.startswith("layers.0.linear_attn") else None


def _ours(names: Collection[str]) -> dict[str, str]:
    return unwrapped(names, _known)


def _recognises(settings: Mapping[str, Any], names: Collection[str]) -> bool:
    ours = set(_ours(names).values())
    return "fc.weight" in ours and "layers.0.hidden_norm.weight" in ours


def _layer(where: object, shape: Mapping[str, Any], shapes: Shapes) -> Any:
    """mlx-lm's ModelArgs of the layers."""
    is_qwen = "layers.0.self_attn.q_norm.weight" in shapes
    values = {
        **layer_settings(where, shape, shapes, inputs=2),
        "model_type": "qwen3" if is_qwen else "llama",
        "rms_norm_eps": float(shape.get("rms_norm_eps", 1e-6)),
        "attention_bias": "layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in shapes,
    }
    return (qwen3 if is_qwen else llama).ModelArgs.from_dict(values)


def _config(where: object, settings: Mapping[str, Any], shapes: Shapes) -> Eagle3Config:
    shape = settings.get("transformer_layer_config", settings)
    if not isinstance(shape, Mapping):
        raise UserError(f"{where}: transformer_layer_config is {shape!r}, not an object")
    layer = _layer(where, shape, shapes)
    reads = reads_of(where, settings)
    captured = len(reads) if reads else 3
    columns = matrix(where, shapes, "fc.weight")[1]
    if columns % captured:
        raise UserError(f"{where}: fc.weight has {columns} columns for {captured} layers")
    vocab_size = setting(where, shape, "vocab_size")
    own_output = "lm_head.weight" in shapes
    if own_output:
        draft = matrix(where, shapes, "lm_head.weight")[0]
        agree(where, "draft_vocab_size", settings.get("draft_vocab_size"), draft)
    else:
        draft = setting(where, settings, "draft_vocab_size", vocab_size)
    nested = settings.get("eagle_config")
    nested = nested if isinstance(nested, Mapping) else {}
    flag = lambda name: bool(settings.get(name) or nested.get(name))
    return Eagle3Config(
        layer=layer,
        layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
        vocab_size=vocab_size,
        draft_vocab_size=draft,
        target_hidden_size=columns // captured,
        reads=reads,
        captured=captured,
        own_embedding="embed_tokens.weight" in shapes,
        own_output=own_output,
        normed_residual=flag("norm_before_residual"),
        norm_input="input_norm.weight" in shapes,
        norm_each="fc_norm.0.weight" in shapes,
        norm_fed_back=flag("norm_output") and "transformer_layer_config" in settings,
    )


def _drafter(
    target: Target, head: Eagle3Head, ids: np.ndarray, experience: Experiences
) -> AttentionDrafter:
    config = head.config
    belongs_to(target, config.target_hidden_size, config.vocab_size)
    reads = config.reads or reads_by_default(len(target.model.layers))
    view = target.tap(reads, final=False, whole_text=True)
    embed = target.embed
    if config.own_embedding and not _is_same(head.embed_tokens, embed):
        embed = head.embed_tokens
    elif config.own_embedding:
        del head["embed_tokens"]
        head.config = replace(config, own_embedding=False)
    elif config.hidden_size != target.hidden_size:
        raise UserError(
            f"the EAGLE-3 head has a hidden size of {config.hidden_size} and brings no embedding, "
            f"but the target's is {target.hidden_size}: the head is incomplete"
        )
    if config.own_output:
        vocabulary = OwnVocabulary(mx.array(ids.astype(np.int32)))
    else:
        vocabulary = targets_vocabulary(target, ids)
    return AttentionDrafter(head, vocabulary, embed, view, experience)


def _is_same(own: nn.Module, target) -> bool:
    """Whether an embedding is a copy of the target's, which need not be kept twice."""
    size = own.weight.shape[0] if "scales" not in own else own.scales.shape[0]
    ids = mx.linspace(0, size - 1, 64).astype(mx.int32)
    a, b = own(ids).astype(mx.float32), target(ids).astype(mx.float32)
    if a.shape != b.shape:
        return False
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    (same,) = device.read(((a * b).sum(axis=-1) >= SAME * lengths).all())
    return bool(same)


KIND = Kind(
    name="eagle3",
    about="a decoder layer on three of the target's (SafeAILab, SpecForge, NVIDIA, speculators)",
    recognises=_recognises,
    ours=_ours,
    config=_config,
    head=Eagle3Head,
    drafter=_drafter,
    outputs=lambda config: ("lm_head",) * config.own_output,
    settings=lambda config: (
        {"draft_vocab_size": config.draft_vocab_size} if config.own_output else {}
    ),
)
