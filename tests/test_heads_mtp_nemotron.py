"""The MTP head of Nemotron-H: two of the model's blocks, attention and experts, are its layer."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache

from convert_heads import convert, settings, write
from families import build, config
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.mtp import KIND
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError
from redrafter_mlx.target.adapter import adapt
from support import generation, ids, tiny_prompt
from test_heads_mtp import DRAWN, H, random_parts, replayed_by

NAME = "nemotron_h"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Its own block of attention, and that of experts."""
    return [next(layer for layer in model.layers if layer.block_type == kind) for kind in "*E"]


def made(path: Path, model: nn.Module, **given) -> dict[str, mx.array]:
    """Write a head with the model's blocks, as nvidia publishes it; what is around them."""
    parts = random_parts(0)
    tensors = {
        "mtp.layers.0.eh_proj.weight": parts["fc"],
        "mtp.layers.0.enorm.weight": parts["embedding"],
        "mtp.layers.0.hnorm.weight": parts["hidden"],
        "mtp.layers.1.final_layernorm.weight": parts["norm"],
    }
    for i, block in enumerate(blocks_of(model)):
        for name, x in tree_flatten(block.parameters()):
            place = f"mtp.layers.{i}."
            for ours, theirs in (("fc1", "up_proj"), ("fc2", "down_proj")):
                if f"switch_mlp.{ours}" in name:
                    for e, expert in enumerate(x):
                        tensors[f"{place}mixer.experts.{e}.{theirs}.weight"] = expert
                    break
            else:
                tensors[place + name] = x
    write(path, tensors, config(NAME) | {"mtp_hybrid_override_pattern": "*E"} | given)
    return parts


def by_hand(model: nn.Module, parts: dict, embedded: mx.array, hidden: mx.array) -> mx.array:
    """(T, h) of mlx-lm's blocks themselves after (T, h) embeddings and (T, h) states."""
    attention, experts = blocks_of(model)
    eps = attention.norm.eps
    joined = [
        mx.fast.rms_norm(embedded, parts["embedding"], eps),
        mx.fast.rms_norm(hidden, parts["hidden"], eps),
    ]
    x = (mx.concatenate(joined, axis=-1) @ parts["fc"].T)[None]
    x = experts(attention(x, create_causal_mask(len(embedded)), KVCache()))
    return mx.fast.rms_norm(x[0], parts["norm"], eps)


@pytest.mark.parametrize("latent", [None, 32])
def test_it_computes_what_mlx_lms_blocks_do(latent, tmp_path):
    """A text, then two drafts side by side and two deep; experts in a smaller space, too."""
    model = build(NAME, moe_latent_size=latent)
    parts = made(tmp_path, model, moe_latent_size=latent)
    drafter, table, states, text, begun, memory = replayed_by(tmp_path)
    expected = by_hand(model, parts, table[mx.array(text[1:])], states)
    np.testing.assert_allclose(begun, expected, atol=1e-4)

    steps = drafter.steps(begun[-1:], [*memory[:-1], memory[-1][-1:]])
    root = steps.advance(None, mx.array(text[-1:]))
    pairs = [mx.array([3, 50]), mx.array([71, 8])]
    first = steps.advance(root[mx.array([0, 0])], pairs[0])
    second = steps.advance(first, pairs[1])
    for row in range(2):
        embedded = table[mx.array(text[1:] + [tokens[row].item() for tokens in pairs])]
        before = mx.concatenate([states, begun[-1:], first.hidden[row : row + 1]])
        expected = by_hand(model, parts, embedded, before)
        np.testing.assert_allclose(first.hidden[row], expected[-2], atol=1e-4)
        np.testing.assert_allclose(second.hidden[row], expected[-1], atol=1e-4)


def test_the_text_is_that_of_plain_decoding(tmp_path):
    model = build(NAME)
    made(tmp_path, model)
    head, found = load_published(KIND, tmp_path, mx.float32)
    drafter = KIND.drafter(adapt(model), head, found, {})
    for sampling in ({}, DRAWN):
        run = generation(model, tiny_prompt(), drafter, **sampling)
        assert ids(run) == ids(generation(model, tiny_prompt(), **sampling))
        assert run.stats.nodes > 2 * run.stats.rounds, "nothing was drafted"


def test_the_routers_bias_stays_in_full_precision(tmp_path):
    made(tmp_path, build(NAME))
    head, _ = load_published(KIND, tmp_path, mx.bfloat16)
    assert head.layer[1].mixer.gate.e_score_correction_bias.dtype == mx.float32
    assert head.layer[1].mixer.gate.weight.dtype == mx.bfloat16


def test_it_is_told_from_other_families_and_converted(tmp_path):
    made(tmp_path / "head", build(NAME))
    result = convert(tmp_path / "head", tmp_path / "out")
    tensors = mx.load(str(result / "model.safetensors"))
    assert recognised(settings(result), tensors) is KIND
    one, two = (load_published(KIND, tmp_path / n, mx.float32)[0] for n in ("head", "out"))
    for (name, a), (_, b) in zip(
        tree_flatten(one.parameters()), tree_flatten(two.parameters()), strict=True
    ):
        np.testing.assert_array_equal(a, b, name)


REFUSED = {
    "recurrent": ({"mtp_hybrid_override_pattern": "M*"}, {}, "are 'M*'; only attention and then"),
    "as a list": (
        {"mtp_layers_block_type": ["full_attention", "mlp"]}, {}, "only attention and then experts"
    ),
    "several": (
        {}, {"mtp.layers.2.norm.weight": mx.ones(H)}, "holds several multi-token-prediction heads"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_other_blocks_and_more_heads_are_refused(wrong, tmp_path):
    given, more, fault = REFUSED[wrong]
    made(tmp_path, build(NAME), **given)
    tensors = mx.load(str(tmp_path / "model.safetensors")) | more
    write(tmp_path, tensors, settings(tmp_path))
    with pytest.raises(UserError, match=re.escape(fault)):
        load_published(KIND, tmp_path, mx.float32)


def test_block_types_may_be_told_as_transformers_does(tmp_path):
    made(tmp_path, build(NAME), mtp_layers_block_type=["attention", "moe"])
    assert len(load_published(KIND, tmp_path, mx.float32)[0].layer) == 2
