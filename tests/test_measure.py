"""Measuring: what the clock says is turned into costs, and what was recorded into tokens."""

import itertools

import numpy as np
import pytest

from families import build
from redrafter_mlx.config import DraftOptions, SamplingOptions, TuneOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.measuring.acceptance import best_choice, record, tokens_per_round
from redrafter_mlx.measuring.measure import (
    Timings,
    bushy_tree,
    measure_drafts,
    measure_passes,
    time_of_draft,
)
from redrafter_mlx.measuring.tuning import tune, verdict
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.policy import settings_within
from redrafter_mlx.target.adapter import adapt
from support import ScriptedDrafter, generation, ids, random_drafter, tiny_prompt

TRUE = np.array([[1.0], [2.0], [2.5], [4.0]])


def timings(speeds, noise=0.0) -> Timings:
    rng = np.random.default_rng(0)
    speeds = np.asarray(speeds)
    return Timings(TRUE * speeds * (1 + noise * rng.standard_normal((4, len(speeds)))))


def test_even_times_are_taken_as_they_are():
    found = timings(np.ones(7), noise=0.02)
    np.testing.assert_allclose(found.typical, TRUE[:, 0], rtol=0.03)
    assert found.complaint() is None


def test_throttling_is_said_and_taken_out():
    found = timings(np.linspace(1.0, 1.6, 9), noise=0.01)
    assert "slowed down" in found.complaint()
    ratios = found.typical / found.typical[0]
    np.testing.assert_allclose(ratios, TRUE[:, 0], rtol=0.03)


def test_a_busy_machine_is_said():
    assert timings(np.ones(9), noise=0.4).complaint()
    assert "evenly" in timings(np.linspace(1.6, 1.0, 9)).complaint()


def test_one_slow_turn_does_no_harm():
    found = timings([1, 1, 5, 1, 1, 1, 1])
    np.testing.assert_allclose(found.typical, TRUE[:, 0], rtol=0.01)
    assert found.complaint() is None


@pytest.fixture(scope="module")
def target():
    return adapt(build("llama"))


def ticking():
    """A clock that a look at advances."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_passes_are_timed_and_nothing_is_kept(target):
    text = tiny_prompt(20)
    found = measure_passes(target, text, [1, 2, 5], turns=3, clock=ticking())
    assert found.seconds.shape == (3, 3)
    assert (found.seconds == 1.0).all(), "each pass lies between two looks at the clock"


@pytest.mark.parametrize("rows", [2, 3, 9, 64])
def test_the_tree_that_is_timed_branches(rows):
    tree = bushy_tree(rows, 7, 97)
    assert len(tree) == rows
    assert tree.is_chain == (rows == 2)


@pytest.mark.parametrize("united", [False, True])
def test_drafts_are_timed(target, united):
    drafter = random_drafter(target.model)
    if united:
        drafter = UnionDrafter([drafter, MaxGramDrafter()])
    settings = settings_within(Setting(2, 3))
    found = measure_drafts(target, drafter, tiny_prompt(9), settings, turns=3, clock=ticking())
    assert found.seconds.tolist() == [[1.0] * 3] * len(settings)


def test_a_timed_draft_comes_after_a_pass_as_in_a_round(target, monkeypatch):
    """Else the head would lie in caches that a pass fills with the target's weights."""
    drafter, seen = random_drafter(target.model), []

    def noting(what, function):
        def noted(*arguments):
            seen.append(what)
            return function(*arguments)

        return noted

    monkeypatch.setattr(type(target), "verify", noting("pass", type(target).verify))
    monkeypatch.setattr(drafter, "propose", noting("draft", drafter.propose))
    settings = settings_within(Setting(2, 3))
    measure_drafts(target, drafter, tiny_prompt(9), settings, turns=2)
    assert seen == ["pass", "draft"] * len(settings) * 4
    seen.clear()
    context = target.prefill(tiny_prompt(9), chunk=512)
    time_of_draft(target, drafter, context, settings[-1])
    assert seen == ["pass", "draft"] * 3


@pytest.mark.parametrize("sampling", [{}, {"temp": 1.0, "seed": 5}])
def test_what_a_recording_promises_is_what_generation_does(target, sampling):
    """For every search and budget, from one recording, to the round."""
    model, prompt = target.model, tiny_prompt(9)
    drafter = random_drafter(model, seed=3)
    full = Setting(3, 4)
    recording = record(target, drafter, prompt, 60, full, SamplingOptions(**sampling))
    assert len(recording.drafts) == 60
    promised = tokens_per_round([recording], full, 22)
    assert promised[1] == 1.0
    assert (np.diff(promised[1:]) >= -1e-9).all()
    for budget in (2, 4, 9, 22):
        options = DraftOptions(beam_width=3, beam_length=4, budget=budget)
        run = generation(model, prompt, drafter, max_tokens=60, draft=options, **sampling)
        ids(run)
        assert run.stats.rounds == round(60 / promised[budget])


def test_narrower_searches_are_read_off_the_wide_one(target):
    """Almost: a narrow search may expand a node that the wide one had no room for."""
    model, prompt = target.model, tiny_prompt(9)
    drafter = random_drafter(model, seed=3)
    recording = record(target, drafter, prompt, 40, Setting(4, 4), SamplingOptions())
    for setting in (Setting(1, 4), Setting(2, 3), Setting(4, 2)):
        own = record(target, drafter, prompt, 40, setting, SamplingOptions())
        most = 1 + setting.width + (setting.length - 2) * setting.width**2
        expected = tokens_per_round([own], setting, most)
        found = tokens_per_round([recording], setting, most)
        np.testing.assert_allclose(found, expected, rtol=0.1)


def test_a_scripted_drafter_yields_what_it_was_told_to(target):
    model, prompt = target.model, tiny_prompt(9)
    plain = ids(generation(model, prompt, max_tokens=60))
    drafter = ScriptedDrafter(prompt + plain, right=3, wrong=1)
    recording = record(target, drafter, prompt, 40, Setting(1, 5), SamplingOptions())
    assert tokens_per_round([recording], Setting(1, 5), 5).tolist() == pytest.approx(
        [1.0, 1.0, 2.0, 40 / 14, 4.0, 4.0], rel=0.05
    )


CURVE = CostCurve([100], [1, 2, 4, 8], [[1.0, 1.1, 1.5, 3.0]])


def test_the_best_choice_is_the_fastest():
    short, long = Setting(1, 2), Setting(4, 5)
    yields = {
        short: np.array([0, 1, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6]),
        long: np.array([0, 1, 1.6, 1.9, 2.2, 2.3, 2.4, 2.4, 2.4]),
    }
    best = best_choice(yields, CURVE, {short: 0.0, long: 0.1}, 100)
    assert (best.setting, best.nodes) == (short, 2)
    assert best.speedup == pytest.approx(1.6 / 1.1)
    best = best_choice(yields, CURVE, {short: 0.0, long: 0.0}, 100)
    assert (best.setting, best.nodes) == (long, 4)
    assert "use budget 4 of 4 x 5 beams: 1.47x" in verdict(best, CURVE, {long: 0.0}, 100)
    worst = best_choice({short: yields[short] * 0 + 1}, CURVE, {short: 0.5}, 100)
    line = verdict(worst, CURVE, {short: 0.5}, 100)
    assert "do not speculate here: at best 0.62x" in line
    assert "1.10 + 0.50" in line


def test_tuning_from_end_to_end(target):
    options = TuneOptions(contexts=(16, 40), rows=8, turns=3, tokens=12)
    drafter = random_drafter(target.model)
    draft = DraftOptions(beam_width=2, beam_length=3)
    found = tune(target, drafter, [tiny_prompt(9), tiny_prompt(5)], options, draft)
    assert found.profile.curve.contexts == [16, 40]
    assert found.profile.curve.rows == list(range(1, 9))
    assert found.profile.drafts.keys() == set(settings_within(Setting(2, 3)))
    assert len(found.verdicts) == 2
    assert found.speedups.keys() == {16, 40}
    plain = tune(target, None, [tiny_prompt(9)], options, draft)
    assert plain.profile.drafts == {}
    assert "must yield" in plain.verdicts[0]
