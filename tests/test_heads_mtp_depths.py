"""Several multi-token-prediction heads, one for each depth: what the paper's formula gives."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert_heads import convert, settings, write
from families import build, config
from redrafter_mlx.drafters.attention import AttentionDrafter, TextCache
from redrafter_mlx.drafters.mtp import KIND
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Trail, View
from redrafter_mlx.target.adapter import adapt
from support import generation, ids, tiny_prompt
from test_heads_mtp import DRAWN, LENGTH, VOCAB, H, by_hand, published, random_parts

DEPTHS = 3
SHARED = ("fc", "embedding", "hidden", "norm")


def parts_of(name: str) -> list[dict[str, mx.array]]:
    """What is around the layer of each depth; Qwen's heads share it."""
    parts = [random_parts(seed) for seed in range(DEPTHS)]
    return [parts[0]] * DEPTHS if name.startswith("qwen") else parts


def models_of(name: str) -> list[nn.Module]:
    """Models of which each lends a layer to the head of its depth."""
    return [build(name, seed=10 + depth) for depth in range(DEPTHS)]


def write_heads(path: Path, name: str, **given) -> tuple[list[nn.Module], list[dict]]:
    models, parts = models_of(name), parts_of(name)
    tensors = {}
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        tensors |= published(name, model, part, k)
    write(path, tensors | given, config(name))
    return models, parts


def reference(name: str, models, parts, table: mx.array, text, states: mx.array, drafted=()):
    """Hidden states (places, h) of each head; drafted tokens follow a text of T + 1 known ones.

    Head k at place i joins what head k - 1 gave there with the token i + 1 + k: the target's
    states (T, h) for the first one. Beyond the heads there are, the last goes on by itself.
    """
    tokens, hidden, found = [*text, *drafted], states, []
    known = len(states)
    for k, (model, part) in enumerate(zip(models, parts, strict=True)):
        ready = tokens[1 + k : 1 + k + known]
        if not ready:  # a text too short for this head
            found.append(hidden := states[:0])
            continue
        hidden = hidden[: len(ready)]
        embedded = table[mx.array(ready)]
        found.append(by_hand(name, model, part, embedded, hidden))
        if k + 1 < len(models):
            hidden = found[-1]
    for token in tokens[len(models) + known :]:
        embedded = mx.concatenate([embedded, table[mx.array([token])]])
        hidden = mx.concatenate([hidden, found[-1][-1:]])
        found[-1] = by_hand(name, models[-1], parts[-1], embedded, hidden)
    return found


def table_and_states(length: int) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(1)
    table = mx.array(rng.standard_normal((VOCAB, H), np.float32))
    return table, mx.array(rng.standard_normal((length, H), np.float32))


NAMES = ["deepseek_v3", "glm4_moe", "glm_moe_dsa", "mimo", "ernie4_5_moe", "qwen3_5", "qwen3_next"]


@pytest.mark.parametrize("length", [1, 2, 3, LENGTH])
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_the_formula_says(name, length, tmp_path):
    """All places of a text, then two drafts of it, side by side and deeper than there are heads."""
    models, parts = write_heads(tmp_path, name)
    head, _ = load_published(KIND, tmp_path, mx.float32)
    assert len(head.depths) == DEPTHS
    table, states = table_and_states(length)
    text = tiny_prompt(length + 1)
    drafter = AttentionDrafter(head, None, lambda t: table[t], View((0,), H))
    begun, memory = drafter.replayed(text, states, 1)
    expected = reference(name, models, parts, table, text, states)
    for k, (ours, theirs) in enumerate(
        zip(mx.split(begun, DEPTHS, axis=-1), expected, strict=True)
    ):
        np.testing.assert_allclose(ours[k:], theirs, atol=2e-4)

    steps = drafter.steps(begun[-1:], [*memory[:-1], memory[-1][-1:]])
    state = steps.advance(None, mx.array(text[-1:]))
    predicting = lambda state: head.predicting(state.hidden, state.depth)
    np.testing.assert_allclose(predicting(state)[0], expected[0][-1], atol=2e-4)
    state = state[mx.array([0, 0])]
    drafted = np.array([[3, 50], [71, 8], [13, 13], [5, 90], [6, 0]])
    for depth, tokens in enumerate(drafted, start=1):
        state = steps.advance(state, mx.array(tokens))
        for row in range(2):
            path = drafted[:depth, row].tolist()
            expected = reference(name, models, parts, table, text, states, path)
            of = min(depth, DEPTHS - 1)
            np.testing.assert_allclose(predicting(state)[row], expected[of][-1], atol=2e-4)


def test_each_depth_has_its_own_head(tmp_path):
    """Drafts would be others if one head served all depths."""
    _, parts = write_heads(tmp_path, "deepseek_v3")
    head, _ = load_published(KIND, tmp_path, mx.float32)
    for own, part in zip(head.depths, parts, strict=True):
        np.testing.assert_array_equal(own.fc.weight, part["fc"])


def test_many_positions_are_drafted_from_at_once(tmp_path):
    """Each as if it were the only one."""
    write_heads(tmp_path, "deepseek_v3")
    head, _ = load_published(KIND, tmp_path, mx.float32)
    table, states = table_and_states(LENGTH)
    text = tiny_prompt(LENGTH + 1)
    drafter = AttentionDrafter(head, None, lambda t: table[t], View((0,), H))
    begun, memory = drafter.replayed(text, states, 1)
    every = drafter.steps(begun, memory)
    state = every.advance(None, mx.array(text[1:]))
    tokens = [mx.array(np.roll(text[1:], -by)) for by in (1, 2, 3, 4)]
    for each in tokens:
        state = every.advance(state, each)
    for p in range(LENGTH):
        alone = drafter.steps(begun[p : p + 1], [*memory[:-1], memory[-1][p : p + 1]])
        one = alone.advance(None, mx.array(text[p + 1 : p + 2]))
        for each in tokens:
            one = alone.advance(one, each[p : p + 1])
        np.testing.assert_allclose(
            head.predicting(state.hidden, 4)[p], head.predicting(one.hidden, 4)[0], atol=1e-4
        )


# ---------------------------------------------------------------------------------------------
# Drafting for a target


def drafter_of(model: nn.Module, path: Path, name: str) -> AttentionDrafter:
    write_heads(path, name)
    head, ids_of_draft = load_published(KIND, path, mx.float32)
    return KIND.drafter(adapt(model), head, ids_of_draft, {})


@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa", "qwen3_5", "mimo"])
def test_the_text_is_that_of_plain_decoding(name, tmp_path):
    model = build(name)
    drafter = drafter_of(model, tmp_path, name)
    for sampling in ({}, DRAWN):
        run = generation(model, tiny_prompt(), drafter, **sampling)
        assert ids(run) == ids(generation(model, tiny_prompt(), **sampling))
        assert run.stats.nodes > 2 * run.stats.rounds, "nothing was drafted"


def fresh(model: nn.Module, drafter: AttentionDrafter, text: list[int], places: int) -> TextCache:
    """What a text's first places leave in an empty cache, in one pass."""
    target, trail = adapt(model), Trail()
    target.read(text[:places], target.empty_caches(), 64, trail=trail)
    found = TextCache(drafter.head, drafter.embed, drafter.view)
    found.of_whole(text[: places + 1], trail.since(0, found), 1)
    return found


def same_caches(ours: TextCache, theirs: TextCache, places: int) -> None:
    assert len(ours._layers) == len(theirs._layers)
    for one, other in zip(
        [*ours._layers, ours._states], [*theirs._layers, theirs._states], strict=True
    ):
        assert one.offset == places
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            a, b = (np.array(x[..., :places, :]) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa", "qwen3_5"])
def test_after_any_rounds_it_keeps_what_a_fresh_start_would(name, sampling, tmp_path):
    model = build(name)
    drafter = drafter_of(model, tmp_path, name)
    text = tiny_prompt() + ids(generation(model, tiny_prompt(), drafter, **sampling))
    places = drafter._text._layers[0].offset
    assert places > len(text) - 12
    same_caches(drafter._text, fresh(model, drafter, text, places), places)


@pytest.mark.parametrize("shared", [1, 7, 20])
def test_another_text_that_begins_alike_is_gone_on_with(shared, tmp_path):
    """What a head made of the shared beginning it reads again where the texts part.

    They share one token more, as in the engine: the last place is of the token after it.
    """
    name = "deepseek_v3"
    model = build(name)
    drafter = drafter_of(model, tmp_path, name)
    target = adapt(model)
    text = tiny_prompt(30)
    drafter.begin(target.prefill(text, chunk=5))
    other = text[: shared + 1] + [(token + 1) % VOCAB for token in text[shared + 1 :]]
    forked = drafter.fork(shared)
    places = len(other) - 1
    trail = Trail(start=shared)
    whole = Trail()
    target.read(other[:places], target.empty_caches(), 64, trail=whole)
    trail.add(whole.since(0, whole)[shared:])
    context = target.prefill(other, chunk=5)
    forked._text.of(context.transcript, trail)
    same_caches(forked._text, fresh(model, drafter, other, places), places)


def test_a_draft_waits_for_the_device_once(tmp_path, monkeypatch):
    name = "deepseek_v3"
    model = build(name)
    drafter = drafter_of(model, tmp_path, name)
    context = adapt(model).prefill(tiny_prompt(), chunk=5)
    waits = []
    read = device.read
    monkeypatch.setattr(device, "read", lambda *arrays: waits.append(1) or read(*arrays))
    tree = drafter.propose(context, FixedBudget(width=3, length=6, nodes=16))
    assert len(waits) == 1
    assert tree.depths.max() >= 2


# ---------------------------------------------------------------------------------------------
# Files


def test_it_is_converted_and_loaded_again(tmp_path):
    name = "deepseek_v3"
    write_heads(tmp_path / "whole", name)
    made = convert(tmp_path / "whole", tmp_path / "made")
    first, second = (
        load_published(KIND, tmp_path / place, mx.float32)[0] for place in ("whole", "made")
    )
    assert len(second.depths) == DEPTHS
    for (name_of_one, one), (_, other) in zip(
        tree_flatten(first.parameters()), tree_flatten(second.parameters()), strict=True
    ):
        np.testing.assert_array_equal(one, other, name_of_one)
    assert settings(made)["model_type"] == name


def test_a_tensor_that_a_further_head_lacks_is_named(tmp_path):
    name = "deepseek_v3"
    write_heads(tmp_path, name)
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    layers = config(name)["num_hidden_layers"]
    del tensors[f"model.layers.{layers + 1}.eh_proj.weight"]
    write(tmp_path, tensors, config(name))
    with pytest.raises(UserError, match=r"lacks the tensors depths\.1\.fc\.weight"):
        load_published(KIND, tmp_path, mx.float32)


def test_a_fork_of_what_was_never_read_is_empty(tmp_path):
    model = build("deepseek_v3")
    drafter = drafter_of(model, tmp_path, "deepseek_v3")
    context = adapt(model).prefill(tiny_prompt(6), chunk=5)
    drafter._text.of(context.transcript, Trail(start=len(context.transcript.tokens) - 1))
    assert all(layer.offset == 0 for layer in drafter._text.fork(3)._layers)
