"""The loop with scripted drafters: exact rounds, exact text, exact cache contents."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from families import build
from redrafter_mlx import decoding
from redrafter_mlx import generation as generation_module
from redrafter_mlx.config import DraftOptions, SamplingOptions
from redrafter_mlx.drafters.protocol import NoDrafter
from redrafter_mlx.machine import device
from redrafter_mlx.measuring.knowledge import Knowledge
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Transcript
from redrafter_mlx.rounds.sampling import Sampler
from redrafter_mlx.rounds.verification import Match
from redrafter_mlx.target.adapter import adapt
from support import (
    BUDGET,
    ScriptedDrafter,
    accept_everything,
    generation,
    ids,
    random_drafter,
    stop_one_short,
    tiny_prompt,
)

N = 40


@pytest.fixture(scope="module", params=["llama", "llama:sliding", "deepseek_v3", "exaone4"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def prompt():
    return tiny_prompt()


@pytest.fixture(scope="module")
def plain(model, prompt):
    """What mlx-lm itself generates greedily."""
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=N)]


def test_plain_decoding_equals_mlx_lm(model, prompt, plain):
    assert ids(generation(model, prompt)) == plain


@pytest.mark.parametrize("decoys", [False, True])
@pytest.mark.parametrize(("right", "wrong"), [(0, 3), (1, 0), (2, 2), (4, 1), (7, 0)])
def test_rounds_are_exact(model, prompt, plain, right, wrong, decoys):
    drafter = ScriptedDrafter(prompt + plain, right, wrong, decoys)
    run = generation(model, prompt, drafter, max_tokens=N)
    assert ids(run) == plain
    assert run.stats.rounds == math.ceil(N / (right + 1))
    full = N // (right + 1)
    assert run.stats.accepted_at[:right] == [
        full + (N % (right + 1) >= depth + 1) for depth in range(right)
    ]


def test_the_cache_holds_what_a_fresh_prefill_of_the_same_text_holds(model, prompt, plain):
    target = adapt(model)
    drafter = ScriptedDrafter(prompt + plain, right=3, wrong=1, decoys=True)
    context = target.prefill(prompt, chunk=5)
    rounds = decoding.decode(target, drafter, Match(Sampler(SamplingOptions())), BUDGET, context)
    text = list(prompt)
    for _ in range(6):
        text += next(rounds).tokens
    kept = [device.read(*rows_of(cache)) for cache in context.caches.layers]
    fresh = target.prefill(text, chunk=len(text)).caches.layers
    for cache, (keys, values) in zip(fresh, kept, strict=True):
        fresh_keys, fresh_values = device.read(*rows_of(cache))
        shared = min(keys.shape[2], fresh_keys.shape[2])  # a window drops rows when it grows
        np.testing.assert_allclose(keys[..., -shared:, :], fresh_keys[..., -shared:, :], atol=1e-4)
        np.testing.assert_allclose(
            values[..., -shared:, :], fresh_values[..., -shared:, :], atol=1e-4
        )


def rows_of(cache):
    keys, values = cache.keys_and_values()
    return keys.astype(mx.float32), values.astype(mx.float32)


@pytest.mark.parametrize("wrong_rule", [accept_everything, stop_one_short])
def test_a_wrong_rule_is_caught(monkeypatch, model, prompt, plain, wrong_rule):
    rules = generation_module.RULES
    monkeypatch.setitem(rules, "match", lambda sampler: wrong_rule(Match(sampler)))
    drafter = ScriptedDrafter(prompt + plain, right=2, wrong=2, decoys=True)
    assert ids(generation(model, prompt, drafter, max_tokens=N)) != plain


@pytest.mark.parametrize("budget", [16, "auto"])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_round_waits_for_the_device_at_most_twice(monkeypatch, temp, budget):
    model, prompt = build("llama"), tiny_prompt()
    drafter = random_drafter(model)
    waits = 0
    evaluate = mx.eval

    def counting(*args):
        nonlocal waits
        waits += 1
        return evaluate(*args)

    options = DraftOptions(budget=budget)
    run = generation(model, prompt, drafter, draft=options, temp=temp, seed=1)
    monkeypatch.setattr(Knowledge, "look_again", lambda *_, **__: False)  # no part of a round
    tokens = iter(run)
    next(tokens)
    monkeypatch.setattr(mx, "eval", counting)
    before = run.stats.rounds
    for _ in tokens:
        pass
    rounds = run.stats.rounds - before
    assert rounds > 5
    assert waits <= 2 * rounds


def test_steps_that_are_not_known_are_handed_on_one_round_later():
    class Fake:
        def __init__(self, name, known):
            self.name, self.is_known = name, known

    log = []

    def rounds():
        for name, known in [("a", False), ("b", False), ("c", True), ("d", False)]:
            log.append(f"made {name}")
            yield Fake(name, known)

    for step in decoding.overlap(rounds()):
        log.append(f"got {step.name}")
    assert log == ["made a", "made b", "got a", "made c", "got b", "got c", "made d", "got d"]


def test_runs_in_turn_do_not_disturb_each_other(model, prompt, plain):
    other = tiny_prompt(30, seed=7)
    alone = ids(generation(model, other, max_tokens=N))
    drafter = ScriptedDrafter(prompt + plain, right=2, wrong=1, decoys=True)
    first = iter(generation(model, prompt, drafter, max_tokens=N))
    second = iter(generation(model, other, random_drafter(model), max_tokens=N))
    pairs = list(zip(first, second, strict=True))
    assert [one.id for one, _ in pairs] == plain
    assert [two.id for _, two in pairs] == alone


def test_plain_rounds_overlap(model, prompt):
    """The next pass is under way before the last token is read."""
    target = adapt(model)
    context = target.prefill(prompt, chunk=64)
    rule = Match(Sampler(SamplingOptions()))
    rounds = decoding.decode(target, NoDrafter(), rule, FixedBudget(1, 2, nodes=1), context)
    step = next(rounds)
    assert not step.is_known
    context.transcript.__class__ = Unreadable
    next(rounds)


class Unreadable(Transcript):
    """A text that must not be waited for."""

    @property
    def tokens(self):
        raise AssertionError("the pending token was read")
