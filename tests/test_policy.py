"""The policy on machines and drafters on paper: it finds the optimum, parks, comes back."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from redrafter_mlx.budget import AutoBudget
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import Policy, settings_within
from redrafter_mlx.tree import Candidates, TokenTree
from simulated import Guesser, Machine, best_fixed, play, yields

FULL = Setting(4, 5)
ROWS = [*range(1, 17), 20, 24, 32, 48, 64]
DIP = [1, 2, 4, 8, 12, 16, 24, 32, 64], [61, 77, 88, 104, 125, 110, 144, 162, 290]
CURVES = {
    "flat": lambda rows, context: 0.02 * (1 + 0.002 * rows),
    "steps": lambda rows, context: 0.02 * (1 if rows <= 5 else 1.9 if rows <= 10 else 2.6),
    "dip at 16": lambda rows, context: (
        float(
            np.interp(
                rows, [1, 2, 4, 8, 12, 16, 24, 32, 64], [61, 77, 88, 104, 125, 110, 144, 162, 290]
            )
        )
        / 1e3
    ),
    "linear": lambda rows, context: 0.02 * (0.2 + 0.8 * rows),
}
GUESSERS = {
    "sure": {"sure": 0.75},
    "middling": {"sure": 0.45},
    "boasting": {"sure": 0.7, "truth": lambda shares: 0.4 * shares},
}
LIARS = {
    "liar": {"sure": 0.7, "truth": lambda shares: 0.02 * shares},
    "clueless": {"sure": 0.05, "truth": lambda shares: 0.02 * shares},
}


def drafts(passes):
    """Seconds of a draft: a tenth of a plain round for the full search."""
    return lambda setting: (
        0.1 * passes(1, 0) * (setting.length - 1) / 4 * (1 if setting.width > 1 else 0.6)
    )


def machine(passes, **noise) -> Machine:
    return Machine(passes, drafts(passes), **noise)


def policy(passes=None) -> Policy:
    """With a measured profile of a machine, or knowing nothing."""
    if passes is None:
        return Policy(FULL)
    curve = CostCurve([100], ROWS, [[passes(rows, 100) for rows in ROWS]])
    table = {setting: drafts(passes)(setting) for setting in settings_within(FULL)}
    return Policy(FULL, LiveCosts(curve), LiveDraftCosts(table))


@cache
def expected(guesser: str):
    return yields(Guesser(**GUESSERS[guesser]), FULL)


def auto(policy, machine) -> AutoBudget:
    return AutoBudget(policy, clock=lambda: machine.now)


@pytest.mark.parametrize("guesser", GUESSERS)
@pytest.mark.parametrize("curve", CURVES)
def test_with_a_profile_it_is_as_fast_as_the_best_fixed_setting(curve, guesser):
    passes = CURVES[curve]
    best = best_fixed(machine(passes), expected(guesser))
    here = machine(passes)
    log = play(here, Guesser(**GUESSERS[guesser]), auto(policy(passes), here), 1500)
    assert log.rate() >= 0.97 * best, log.rate() / best


@pytest.mark.parametrize("curve", CURVES)
def test_without_a_profile_it_gets_there(curve):
    passes, guesser = CURVES[curve], GUESSERS["sure"]
    best = best_fixed(machine(passes), expected("sure"))
    here = machine(passes, compile=0.03)
    log = play(here, Guesser(**guesser), auto(policy(), here), 2000)
    assert log.rate(first=len(log.tokens) // 3) >= 0.95 * best


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize("known", [True, False])
def test_a_useless_drafter_costs_next_to_nothing(liar, known):
    passes = CURVES["dip at 16"]
    here = machine(passes, noise=0.02)
    log = play(here, Guesser(**LIARS[liar]), auto(policy(passes if known else None), here), 1500)
    assert log.rate() >= 0.975 / passes(1, 0), log.rate() * passes(1, 0)
    late = log.settings[len(log.settings) // 2 :]
    assert sum(setting is not None for setting in late) < 0.02 * len(late)


def test_a_drafter_that_costs_nothing_waits_for_its_moment():
    """Max-Gram has no idea for a long while, then a long echo."""
    passes = CURVES["flat"]
    here, silent = machine(passes), Guesser(sure=0.02, truth=lambda shares: 0.0 * shares)
    here.drafts = lambda setting: 1e-3 * passes(1, 0)
    kept = policy()
    silent.draft = lambda setting: Candidates.of(TokenTree.root(0))
    log = play(here, silent, auto(kept, here), 300)
    assert not kept.is_parked
    assert log.rate() > 0.99 / passes(1, 0)
    echo = play(here, Guesser(sure=0.95), auto(kept, here), 100)
    assert echo.rate() > 2 / passes(1, 0)


def test_what_needs_no_search_is_never_left_for_long():
    """Lookups that cost too much to be made in vain: still one begins every 32 rounds or so."""
    passes = CURVES["flat"]
    here, silent = machine(passes), Guesser(sure=0.02, truth=lambda shares: 0.0 * shares)
    here.drafts = lambda setting: 0.06 * passes(1, 0)
    silent.draft = lambda setting: Candidates.of(TokenTree.root(0))
    kept = policy(passes)
    kept.draft_costs = LiveDraftCosts({s: here.drafts(s) for s in settings_within(FULL)})
    log = play(here, silent, auto(kept, here), 600)
    looked = np.flatnonzero([setting is not None for setting in log.settings])
    assert len(looked) < 100
    assert np.diff(looked).max() <= Policy.FIRST_PAUSE + Policy.TIMING
    assert log.rate() > 0.98 / passes(1, 0)


@pytest.mark.parametrize(("gain", "said"), [(0.8, " (expected 0.80x plain decoding)"), (1.1, "")])
def test_a_parked_drafter_is_not_said_to_gain(monkeypatch, gain, said):
    """What was expected last may look like a gain where drafts led to nothing."""
    passes = CURVES["linear"]
    here = machine(passes)
    budget = auto(policy(passes), here)
    assert budget.note == ""
    play(here, Guesser(**LIARS["liar"]), budget, 20)
    monkeypatch.setattr(Policy, "gain", gain)
    assert budget.note.startswith(f"drafting does not pay here{said}, so the drafter is parked")


def test_pauses_double():
    passes = CURVES["linear"]
    here = machine(passes)
    log = play(here, Guesser(**LIARS["liar"]), auto(policy(passes), here), 1200)
    drafted = np.array([setting is not None for setting in log.settings])
    edges = np.flatnonzero(np.diff(drafted.astype(int))) + 1
    pauses = [b - a for a, b in pairwise(edges) if not drafted[a]]
    assert len(pauses) >= 3
    assert all(1.9 * a <= b <= 2.2 * a for a, b in pairwise(pauses)), pauses


def test_it_comes_back_when_the_drafter_gets_good_and_goes_when_it_gets_bad():
    passes = CURVES["dip at 16"]
    here, guesser = machine(passes), Guesser(**LIARS["liar"])
    kept = policy(passes)
    play(here, guesser, auto(kept, here), 100)
    assert kept.is_parked
    guesser.truth = lambda shares: shares
    log = play(here, guesser, auto(kept, here), 800)  # another text
    assert not kept.is_parked
    assert sum(setting is not None for setting in log.settings) > 0.8 * len(log.settings)
    guesser.truth = lambda shares: 0.02 * shares
    log = play(here, guesser, auto(kept, here), 400)
    assert kept.is_parked
    assert sum(setting is not None for setting in log.settings) < 60


def test_each_new_text_gets_a_trial_at_once_that_costs_little():
    """However many failed: a drafter that was no use for nine texts may be some for the tenth."""
    passes = CURVES["dip at 16"]
    here, kept, logs = machine(passes), policy(passes), []
    for _ in range(9):
        logs.append(play(here, Guesser(**LIARS["liar"]), auto(kept, here), 80))
    assert all(any(log.settings[:6]) for log in logs)
    late = logs[4:]
    tokens = sum(log.rate() * sum(log.seconds) for log in late)
    assert tokens / sum(sum(log.seconds) for log in late) > 0.98 / passes(1, 0)
    log = play(here, Guesser(**GUESSERS["sure"]), auto(kept, here), 80)
    assert sum(setting is not None for setting in log.settings) > 0.8 * len(log.settings)


def test_a_trial_that_was_refuted_is_over():
    """Sure and wrong: what was expected before the first pass keeps nobody drafting."""
    passes = CURVES["dip at 16"]
    here, kept = machine(passes), policy(passes)
    liar = Guesser(sure=0.9, truth=lambda shares: 0.0 * shares)
    for _ in range(4):
        log = play(here, liar, auto(kept, here), 40)
        drafted = sum(setting is not None for setting in log.settings)
        assert drafted <= Policy.FIRST_TRIAL + Policy.TRIAL, drafted
    assert [bool(setting) for setting in log.settings].count(True) <= Policy.TRIAL + 1


def test_nothing_accepted_is_no_gain_however_dear_plain_rounds_looked():
    """Plain rounds were timed while the machine was slow: two rows seem to cost less than one."""
    passes = lambda rows, context: 0.02 * (0.98 + 0.02 * rows)
    here, kept = machine(passes), policy(passes)
    for _ in range(5):
        kept.costs.observe(1, 100, 1.15 * passes(1, 100))
    log = play(here, Guesser(sure=0.3, truth=lambda shares: 0.0 * shares), auto(kept, here), 60)
    assert sum(setting is not None for setting in log.settings) < 25


@pytest.mark.parametrize(("sure", "soon"), [(0.65, True), (0.75, False)])
def test_where_little_is_at_stake_plain_rounds_are_timed_again_soon(sure, soon):
    passes = lambda rows, context: 0.02 * (0.6 + 0.4 * rows)
    here, kept = machine(passes), policy(passes)
    log = play(here, Guesser(sure), auto(kept, here), 300)
    plain = sum(setting is None for setting in log.settings)
    assert (plain > Policy.TIMING) == soon, plain


@pytest.mark.parametrize("curve", ["flat", "dip at 16"])
def test_it_does_not_oscillate_where_speculation_pays(curve):
    """Noise and outliers: it goes on speculating, with one kind of search."""
    passes = CURVES[curve]
    here = machine(passes, noise=0.1, outlier=0.02)
    kept = policy(passes)
    log = play(here, Guesser(**GUESSERS["sure"]), auto(kept, here), 2500)
    plain = sum(setting is None for setting in log.settings)
    timing = Policy.TIMING * (1 + len(log.nodes) // LiveCosts.FORGET)
    assert plain <= timing, "it never parks, it only times plain decoding now and then"
    late = [setting for setting in log.settings[len(log.settings) // 2 :] if setting]
    assert len(set(late)) <= 3, "searches of one or two kinds, beside the surveys"


def test_break_even_costs_nothing_either_way():
    """A drafter that is just worth its price: whatever is done, plain decoding is not undercut."""
    passes = CURVES["dip at 16"]
    for sure in (0.3, 0.4, 0.5):
        here = machine(passes, noise=0.05)
        log = play(here, Guesser(sure=sure), auto(policy(passes), here), 1500)
        assert log.rate() >= 0.97 / passes(1, 0), sure


def test_a_machine_that_gets_hot_keeps_speculating():
    passes = CURVES["dip at 16"]
    here, kept = machine(passes), policy(passes)
    guesser = Guesser(**GUESSERS["sure"])
    play(here, guesser, auto(kept, here), 600)
    here.slow_down = 1.6
    log = play(here, guesser, auto(kept, here), 1500)
    plain = sum(setting is None for setting in log.settings)
    assert plain <= 2 * Policy.TIMING + Policy.FIRST_PAUSE


@pytest.mark.parametrize("known", [True, False])
def test_it_stops_where_the_context_makes_trees_dear(known):
    """Wide passes get dearer with the context; beyond some length they do not pay."""
    passes = lambda rows, context: 0.02 * (1 + (rows - 1) * context / 4000)
    here = machine(passes)
    kept = policy()
    if known:
        rows, contexts = [1, 2, 4, 8, 16, 32, 64], [100, 1000, 4000]
        curve = CostCurve(contexts, rows, [[passes(n, c) for n in rows] for c in contexts])
        kept = Policy(FULL, LiveCosts(curve))
    guesser = Guesser(**GUESSERS["middling"])
    short = play(here, guesser, auto(kept, here), 600, context=100)
    assert short.rate(first=60) > 1.2 / 0.02
    long = play(here, guesser, auto(kept, here), 900, context=9000)
    assert long.rate() > 0.95 / 0.02
    assert kept.is_parked


def test_a_short_search_serves_where_long_ones_find_nothing():
    """The drafter knows the next token and no further."""
    passes = CURVES["flat"]
    here, kept = machine(passes), policy(passes)

    class Shortsighted(Guesser):
        def accepted(self, tree):
            return super().accepted(tree)[:2]

    log = play(here, Shortsighted(sure=0.8), auto(kept, here), 800)
    assert kept.setting.length <= 3
    late = [setting for setting in log.settings[len(log.settings) // 2 :] if setting]
    assert np.mean([setting == FULL for setting in late]) < 0.2


def test_no_time_at_all_is_survived():
    """A clock too coarse for a round."""
    here = machine(lambda rows, context: 1e-12)
    log = play(here, Guesser(sure=0.5), AutoBudget(policy(), clock=lambda: 0.0), 300)
    assert sum(log.tokens) >= 300


def test_probabilities_are_corrected_by_what_was_accepted():
    calibration = Calibration(depths=2)
    candidates = Candidates(
        0, np.array([1, 2, 3]), np.array([-1, -1, 0]), np.log([0.6, 0.2, 0.55]), np.array([2])
    )
    np.testing.assert_allclose(calibration.probabilities(candidates), [0.6, 0.2, 0.55])
    for turn in range(300):
        calibration.count(candidates, [0, 2] * (turn % 10 < 3))
    probs = calibration.probabilities(candidates)
    np.testing.assert_allclose(probs, [0.3, 0.0, 0.3], atol=0.08)
    assert probs[2] <= probs[0], "a child is never likelier than its parent"
    calibration.doubt()
    np.testing.assert_allclose(calibration.probabilities(candidates)[0], 0.4, atol=0.15)


def test_a_text_that_is_easier_than_others_shows_soon_and_is_forgotten_with_it():
    calibration = Calibration(depths=2)
    chain = Candidates.of(TokenTree.from_beams([[0, 1, 2]], np.log([[1.0, 0.5, 0.2]])))
    verified = np.arange(2)
    for turn in range(400):
        calibration.observe(chain, verified, [0, 1][: (turn % 2) * (1 + (turn % 5 == 1))])
    before = calibration.probabilities(chain)
    np.testing.assert_allclose(before, [0.5, 0.1], atol=0.1)
    for _ in range(12):
        calibration.observe(chain, verified, [0, 1])
    easy = calibration.probabilities(chain)
    assert (easy > 1.3 * before).all()
    assert easy[1] <= easy[0] <= 0.99
    calibration.begin_text()
    np.testing.assert_allclose(calibration.probabilities(chain), before, atol=0.12)


def test_a_useless_drafter_does_not_spoil_what_is_found_without_it():
    """As in a union of a bad head and Max-Gram."""
    calibration = Calibration(depths=2)
    both = Candidates(
        0, np.array([1, 2]), np.array([-1, -1]), np.log([0.6, 0.5]), np.array([0, 1]),
        always=np.array([False, True]),
    )  # fmt: skip
    for turn in range(200):
        calibration.observe(both, np.arange(2), [1] * (turn % 2))
    np.testing.assert_allclose(calibration.probabilities(both), [0.0, 0.5], atol=0.05)
    calibration.begin_text()
    np.testing.assert_allclose(calibration.probabilities(both), [0.0, 0.5], atol=0.05)


def test_probabilities_of_nothing():
    nothing = Candidates(0, *(np.zeros(0, int),) * 2, np.zeros(0), np.zeros(0, int))
    assert Calibration(3).probabilities(nothing).size == 0
    assert len(Policy(FULL).choose(FULL, nothing, 100)) == 1
