"""Models with recurrent layers: what a commit leaves is what a fresh reading of the text leaves."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target import hooks, lineage, recurrence, state
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.state import StateCache
from support import ScriptedDrafter, generation, ids, tiny_prompt

HYBRIDS = [
    "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "baichuan_m1", "falcon_h1", "gear",
    "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2", "nemotron_h",
    "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv7",
]  # fmt: skip
TREES = {
    "a chain": [-1, 0, 1, 2, 3, 4],
    "a bush": [-1, 0, 1, 1, 0, 4, 4, 0],
}
BEGUN = 11


@cache
def target_of(name):
    return Target(build(name))


def tree_of(parents, vocab_size):
    tokens = np.random.default_rng(len(parents)).permutation(vocab_size)[: len(parents)]
    return TokenTree(tokens.astype(np.int32), np.array(parents, np.int32), np.zeros(len(parents)))


def arrays(caches):
    """What caches hold, as flat arrays, rejected rows left out."""
    found = []
    for layer in caches.branching:
        if isinstance(layer, StateCache):
            found += [x for x in layer.state if x is not None]
        else:
            found += layer.keys_and_values()
    return [np.array(x.astype(mx.float32)) for x in found]


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("name", HYBRIDS)
def test_every_accepted_path_leaves_what_its_text_does(name, parents):
    target, tree = target_of(name), tree_of(parents, 97)
    prompt = [*tiny_prompt(BEGUN), int(tree.tokens[0])]
    for row in range(len(tree)):
        path = tree.path(row)
        context = target.prefill(prompt, chunk=64)
        target.verify(context, tree)
        context.caches.commit(path)
        fresh = target.empty_caches()
        target.read([*prompt[:-1], *tree.tokens[path].tolist()], fresh, chunk=64)
        for ours, theirs in zip(arrays(context.caches), arrays(fresh), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", HYBRIDS)
def test_nothing_of_a_rejected_tree_is_left(name):
    target, tree = target_of(name), tree_of(TREES["a bush"], 97)
    context = target.prefill(tiny_prompt(BEGUN), chunk=64)
    before = arrays(context.caches)
    target.verify(context, tree)
    context.caches.commit([])
    for ours, theirs in zip(arrays(context.caches), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("name", HYBRIDS)
def test_long_texts(name, temp):
    model, prompt, tokens = build(name), tiny_prompt(BEGUN), 140
    options = {"max_tokens": tokens, "temp": temp, **({"seed": 1} if temp else {})}
    plain = ids(generation(model, prompt, **options))
    drafter = ScriptedDrafter(prompt + plain, right=3, wrong=1, decoys=True)
    assert ids(generation(model, prompt, drafter, **options)) == plain
    if temp == 0:
        theirs = generate_step(mx.array(prompt), build(name), max_tokens=tokens)
        assert plain == [token for token, _ in theirs]


def test_a_model_is_left_as_it_was_for_others():
    """mlx-lm's own functions and caches work beside ours, also after a pass that failed."""
    model, prompt = build("qwen3_5"), mx.array(tiny_prompt(BEGUN))
    before = [token for token, _ in generate_step(prompt, model, max_tokens=8)]
    target = Target(model)
    context = target.prefill(prompt.tolist(), chunk=64)
    context.caches.begin(2)
    with pytest.raises(ValueError, match="unpack"):
        target.forward(mx.zeros((1, 2, 3), mx.int32), context.caches)
    assert [token for token, _ in generate_step(prompt, model, max_tokens=8)] == before


def plant(monkeypatch, fault):
    real = {
        "windows": lineage.Lineage._rows_of_windows,
        "delta": recurrence.delta_rule,
        "window": StateCache.keep_window,
        "state": StateCache.keep_state,
    }
    faults = {
        "a window one short": (
            lineage.Lineage, "_rows_of_windows",
            lambda self, size: np.maximum(real["windows"](self, size) - 1, 0),
        ),
        "a state shared by two paths": (
            hooks, "delta_rule",
            lambda *args: real["delta"](*args[:-1], lineage.Lineage.chain(len(args[-1]))),
        ),
        "a convolution missed by the tape": (
            StateCache, "keep_window", lambda self, *args, **more: None
        ),
        "a recurrence missed by the tape": (StateCache, "keep_state", lambda self, new, after: new),
        "a commit that forgets its last row": (
            state, "_latest",
            lambda rows, kept, axis, path: rows[:, :kept],
        ),
        "a row that was rejected advances the state": (
            StateCache, "keep_state",
            lambda self, new, after: real["state"](self, new, lambda row: new),
        ),
    }  # fmt: skip
    monkeypatch.setattr(*faults[fault])


@pytest.mark.parametrize(
    "fault",
    [
        "a window one short",
        "a state shared by two paths",
        "a convolution missed by the tape",
        "a recurrence missed by the tape",
        "a commit that forgets its last row",
        "a row that was rejected advances the state",
    ],
)
def test_a_fault_is_found_when_a_model_is_loaded(monkeypatch, fault):
    plant(monkeypatch, fault)
    with pytest.raises(UserError, match="cannot verify a tree"):
        Target(build("qwen3_5"))


def test_what_mlx_lm_has_changed_is_refused_by_name(monkeypatch):
    from mlx_lm.models import ssm

    stock = getattr(ssm.ssm_attn, "_stock", ssm.ssm_attn)

    def changed(x, A_log, B, C, D, dt, bias, *args, **kwargs):
        return stock(x, A_log, B, C, D, dt, bias, *args, **kwargs)

    monkeypatch.setattr(ssm, "ssm_attn", changed)
    with pytest.raises(UserError, match=r"mlx_lm\.models\.ssm\.ssm_attn takes \(x, A_log, B, C"):
        Target(build("mamba2"))
