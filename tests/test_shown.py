"""What a drafter is shown after each round: the states of the text that stands, in its order.

The text stays right whatever a drafter is shown; only what it proposes becomes worse. So this is
pinned here, for each way in which a path can lie in a tree.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Transcript
from redrafter_mlx.target.adapter import Target, adapt
from support import ScriptedDrafter, generation, ids, tiny_prompt

FAMILIES = ["llama", "gemma3_text", "qwen3_5", "lfm2", "falcon_h1", "llama4", "gpt2"]


class Watcher(ScriptedDrafter):
    """Proposes what is right among what is wrong, and notes what it is shown."""

    readers = 1

    def __init__(self, view, *script, **how):
        super().__init__(*script, **how)
        self.view, self.last, self.rows, self.tokens = view, [], [], []

    def propose(self, context, budget):
        self.last.append((context.position, self.view(context.hidden)))
        held = sum(map(len, self.rows))
        new = context.trail.since(held, self)
        if new is not None:
            self.rows.append(self.view(new))
        self.tokens = list(context.transcript.tokens)
        return super().propose(context, budget)


def states_of(family: str, layers, text) -> np.ndarray:
    """(T, C) of a text that is read at once."""
    target = Target(build(family))
    view = target.tap(layers, whole_text=True)
    caches = target.empty_caches()
    caches.begin(len(text), certain=True)
    (found,) = device.read(view(target.forward(mx.array([text]), caches).hidden[0]))
    return found


@pytest.mark.parametrize("shape", ["first rows", "later rows", "nothing right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_of_the_text_in_its_order(family, shape):
    model, prompt = build(family), tiny_prompt(11)
    plain = ids(generation(build(family), prompt, max_tokens=30))
    layers = (0, 1)
    view = adapt(model).tap(layers, whole_text=True)
    right = 0 if shape == "nothing right" else 3
    watcher = Watcher(view, prompt + plain, right, wrong=2, decoys=shape == "later rows")
    run = generation(model, prompt, watcher, max_tokens=30)
    assert ids(run) == plain
    assert run.stats.rounds == (30 if right == 0 else 8)
    shown = np.concatenate([np.array(rows) for rows in watcher.rows])
    expected = states_of(family, layers, watcher.tokens[:-1])
    assert shown.shape == expected.shape
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-3)
    for position, hidden in watcher.last:
        np.testing.assert_allclose(np.array(hidden)[0], expected[position - 1], 1e-3, 1e-3)


def test_the_transcript_is_the_text():
    model, prompt = build("llama"), tiny_prompt(11)
    plain = ids(generation(build("llama"), prompt, max_tokens=30))
    watcher = Watcher(adapt(model).tap((), whole_text=True), prompt + plain, 3, wrong=1)
    ids(generation(model, prompt, watcher, max_tokens=30))
    assert watcher.tokens == (prompt + plain)[: len(watcher.tokens)]
    assert isinstance(Transcript([1]).tokens[0], int)
