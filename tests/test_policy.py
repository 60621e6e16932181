"""The policy on machines and drafters on paper: it finds the optimum, gives up, comes back."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from redrafter_mlx.pricing.budget import AutoBudget
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import Policy, settings_within
from redrafter_mlx.rounds.tree import Candidates, TokenTree
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


def policy(passes, samples=(), **kind) -> Policy:
    """With a measured profile of a machine."""
    curve = CostCurve([100], ROWS, [[passes(rows, 100) for rows in ROWS]])
    table = {setting: drafts(passes)(setting) for setting in settings_within(FULL)}
    return Policy(FULL, LiveCosts(curve), LiveDraftCosts(table), None, samples, **kind)


def max_gram(passes, seconds: float) -> Policy:
    """Of a drafter that needs no search, whose lookups take `seconds`."""
    kept = policy(passes, looks=True, searches=False)
    kept.draft_costs = LiveDraftCosts({Setting(0, 5): seconds})
    return kept


def drafted(log) -> int:
    return sum(setting is not None for setting in log.settings)


class Echo(Guesser):
    """What it says is found without a search."""

    def draft(self, setting):
        found = super().draft(FULL)
        return replace(found, always=np.ones(len(found.tokens), bool))


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
    log = play(here, Guesser(**GUESSERS[guesser]), auto(policy(passes), here), 1000)
    assert log.rate() >= 0.97 * best, log.rate() / best


@pytest.mark.parametrize("curve", CURVES)
def test_with_samples_it_is_there_at_once(curve):
    """What a head brings with it: a text of 60 tokens is as fast as a long one."""
    passes, guesser = CURVES[curve], Guesser(**GUESSERS["sure"])
    best = best_fixed(machine(passes), expected("sure"))
    rates = []
    for _ in range(20):
        here = machine(passes, noise=0.05)
        kept = policy(passes, [guesser.draft(FULL) for _ in range(32)])
        rates.append(play(here, guesser, auto(kept, here), 60).rate())
    assert np.mean(rates) >= 0.95 * best


@pytest.mark.parametrize("liar", LIARS)
def test_a_useless_drafter_costs_next_to_nothing(liar):
    passes = CURVES["dip at 16"]
    here = machine(passes, noise=0.02)
    log = play(here, Guesser(**LIARS[liar]), auto(policy(passes), here), 1500)
    assert log.rate() >= 0.985 / passes(1, 0), log.rate() * passes(1, 0)
    late = log.settings[len(log.settings) // 2 :]
    assert sum(setting is not None for setting in late) < 0.05 * len(late)


@pytest.mark.parametrize(("logprob", "doubtful"), [(-0.1, True), (-9.0, False)])
def test_what_trees_cost_is_asked_again_where_they_might_pay(logprob, doubtful):
    """Passes take much less time than known; a survey would cost a useless drafter's text most."""
    passes = CURVES["dip at 16"]
    scores = np.array([logprob, 2 * logprob])
    chain = Candidates(0, np.zeros(2, int), np.array([-1, 0]), scores, np.zeros(0))
    kept = policy(passes, [chain] * 8)
    assert not kept.is_doubtful
    for _ in range(5):
        kept.costs.observe(1, 100, 0.5 * passes(1, 100))
    assert kept.costs.is_outdated
    assert kept.is_doubtful is doubtful


def test_a_drafter_that_costs_nothing_waits_for_its_moment():
    """Max-Gram has no idea for a long while, then a long echo."""
    passes = CURVES["flat"]
    here, silent = machine(passes), Guesser(sure=0.02, truth=lambda shares: 0.0 * shares)
    here.drafts = lambda setting: 1e-3 * passes(1, 0)
    kept = max_gram(passes, 1e-3 * passes(1, 0))
    silent.draft = lambda setting: Candidates.of(TokenTree.root(0))
    budget = auto(kept, here)
    log = play(here, silent, budget, 300)
    assert drafted(log) == len(log.settings)
    assert log.rate() > 0.99 / passes(1, 0)
    echo = play(here, Echo(sure=0.95), budget, 100)
    assert echo.rate() > 2 / passes(1, 0)


def test_what_needs_no_search_is_never_left_for_long():
    """Lookups that cost too much to be made in vain: still one begins every now and then."""
    passes = CURVES["flat"]
    here, silent = machine(passes), Guesser(sure=0.02, truth=lambda shares: 0.0 * shares)
    here.drafts = lambda setting: 0.3 * passes(1, 0)
    silent.draft = lambda setting: Candidates.of(TokenTree.root(0))
    log = play(here, silent, auto(max_gram(passes, 0.3 * passes(1, 0)), here), 600)
    looked = np.flatnonzero([setting is not None for setting in log.settings])
    assert len(looked) < 60
    assert np.diff(looked).max() <= 32
    assert log.rate() > 0.96 / passes(1, 0)


def test_looking_in_vain_costs_what_a_plain_round_hides():
    """On a fast device a round that waits for its token is slower, however cheap the lookup."""
    passes = CURVES["flat"]
    here, silent = machine(passes), Guesser(sure=0.02, truth=lambda shares: 0.0 * shares)
    here.drafts = lambda setting: 1e-3 * passes(1, 0)
    here.vain = 0.5 * passes(1, 0)
    silent.draft = lambda setting: Candidates.of(TokenTree.root(0))
    log = play(here, silent, auto(max_gram(passes, 1e-3 * passes(1, 0)), here), 600)
    assert log.rate() > 0.96 / passes(1, 0)
    assert drafted(log) > 600 / 100, "an echo may begin anywhere"


def test_the_user_is_told_when_drafting_does_not_pay():
    passes = CURVES["linear"]
    here = machine(passes)
    budget = auto(policy(passes), here)
    assert budget.note == ""
    play(here, Guesser(**LIARS["liar"]), budget, 200)
    assert budget.note.startswith("drafting does not pay here")
    assert "redrafter_mlx.tune" in budget.note


def test_what_was_given_up_is_tried_again_less_and_less_often():
    """The more evidence there is, the longer it takes to fade."""
    passes = CURVES["dip at 16"]
    here = machine(passes)
    log = play(here, Guesser(**LIARS["liar"]), auto(policy(passes), here), 4000)
    tried = np.flatnonzero([setting is not None for setting in log.settings])
    pauses = np.diff(tried)[np.diff(tried) > 1]
    assert len(pauses) >= 6
    assert np.mean(pauses[len(pauses) // 2 :]) > np.mean(pauses[: len(pauses) // 2])
    assert len(tried) < 0.05 * len(log.settings)


def test_it_comes_back_when_the_drafter_gets_good_and_goes_when_it_gets_bad():
    passes = CURVES["dip at 16"]
    here, guesser = machine(passes), Guesser(**LIARS["liar"])
    kept = policy(passes)
    play(here, guesser, auto(kept, here), 100)
    guesser.truth = lambda shares: shares
    logs = [play(here, guesser, auto(kept, here), 400) for _ in range(4)]
    assert drafted(logs[-1]) > 0.8 * len(logs[-1].settings)
    guesser.truth = lambda shares: 0.02 * shares
    log = play(here, guesser, auto(kept, here), 400)
    assert drafted(log) < 0.5 * len(log.settings)
    log = play(here, guesser, auto(kept, here), 400)
    assert drafted(log) < 0.4 * len(log.settings)
    assert log.rate() >= 0.96 / passes(1, 0)


def test_a_drafter_that_failed_in_other_texts_is_tried_in_a_new_one_before_long():
    """However many failed: a drafter that was no use for nine texts may be some for the tenth."""
    passes = CURVES["dip at 16"]
    here, kept, logs = machine(passes), policy(passes), []
    for _ in range(9):
        logs.append(play(here, Guesser(**LIARS["liar"]), auto(kept, here), 80))
    late = logs[4:]
    tokens = sum(log.rate() * sum(log.seconds) for log in late)
    assert tokens / sum(sum(log.seconds) for log in late) > 0.985 / passes(1, 0)
    logs = [play(here, Guesser(**GUESSERS["sure"]), auto(kept, here), 80) for _ in range(12)]
    assert drafted(logs[-1]) > 0.8 * len(logs[-1].settings)


@pytest.mark.parametrize("texts", [1, 3, 9])
@pytest.mark.parametrize("bad", [LIARS["clueless"], {"sure": 0.12}], ids=["clueless", "unsure"])
def test_a_drafter_that_knew_nothing_of_other_texts_is_tried_in_a_new_one(bad, texts):
    """What its searches found there tells little of what they find here."""
    passes = CURVES["dip at 16"]
    here, kept = machine(passes), policy(passes)
    for _ in range(texts):
        log = play(here, Guesser(**bad), auto(kept, here), 80)
    assert log.rate() > 0.985 / passes(1, 0)
    log = play(here, Guesser(**GUESSERS["sure"]), auto(kept, here), 80)
    assert drafted(log) > 12
    assert log.rate() > 1.5 / passes(1, 0)


def test_sure_and_wrong_is_found_out_in_a_few_rounds():
    passes = CURVES["dip at 16"]
    here, kept = machine(passes), policy(passes)
    liar = Guesser(sure=0.9, truth=lambda shares: 0.0 * shares)
    counts = [drafted(play(here, liar, auto(kept, here), 40)) for _ in range(4)]
    assert counts[0] <= 20
    assert sum(counts[1:]) <= 20, counts


def test_nothing_accepted_is_no_gain_however_dear_plain_rounds_looked():
    """Plain rounds were timed while the machine was slow: two rows seem to cost less than one."""
    passes = lambda rows, context: 0.02 * (0.98 + 0.02 * rows)
    here, kept = machine(passes), policy(passes)
    for _ in range(5):
        kept.costs.observe(1, 100, 1.15 * passes(1, 100))
    log = play(here, Guesser(sure=0.3, truth=lambda shares: 0.0 * shares), auto(kept, here), 60)
    assert drafted(log) < 25


def test_what_was_found_without_a_search_is_not_searched_for():
    """A sure echo leaves a search nothing to add; a poor one does."""
    passes = CURVES["dip at 16"]
    head = Guesser(**GUESSERS["middling"])
    kept = policy(passes, [head.draft(FULL) for _ in range(32)], looks=True)
    assert kept.plan(100) == Setting(0, 5)
    echo = lambda prob: Candidates.of(TokenTree.from_beams([range(9)], prob * np.arange(9)[None]))
    assert kept.search(echo(np.log(0.98))) is None
    assert kept.search(echo(np.log(0.05))) in kept.samples.settings
    assert kept.search(Candidates.of(TokenTree.root(0))) in kept.samples.settings


@pytest.mark.parametrize("curve", ["flat", "dip at 16"])
def test_it_does_not_oscillate_where_speculation_pays(curve):
    """Noise and outliers: it goes on speculating, with one kind of search."""
    passes = CURVES[curve]
    here = machine(passes, noise=0.1, outlier=0.02)
    kept = policy(passes)
    log = play(here, Guesser(**GUESSERS["sure"]), auto(kept, here), 2500)
    assert drafted(log) >= 0.99 * len(log.settings)
    late = [setting for setting in log.settings[len(log.settings) // 2 :] if setting]
    assert np.mean([s in late[:1] or s == FULL for s in late]) > 0.3


@pytest.mark.parametrize("liar", LIARS)
def test_a_machine_of_changing_speed_makes_nothing_worth_a_search(liar):
    """What a search is worth and what a plain round is worth are compared at the same costs."""
    passes = CURVES["dip at 16"]
    guesser, here = Guesser(**LIARS[liar]), machine(passes)
    kept = policy(passes, [guesser.draft(FULL) for _ in range(32)])
    play(here, guesser, auto(kept, here), 300)
    budget, searches = auto(kept, here), 0
    for turn in range(100):
        here.slow_down = (1.0, 1.6)[turn % 2]
        searches += drafted(play(here, guesser, budget, 5))
    assert searches < 0.06 * 500


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
    assert len(log.settings) - drafted(log) <= 8


def test_it_stops_where_the_context_makes_trees_dear():
    """Wide passes get dearer with the context; beyond some length they do not pay."""
    passes = lambda rows, context: 0.02 * (1 + (rows - 1) * context / 4000)
    here = machine(passes)
    rows, contexts = [1, 2, 4, 8, 16, 32, 64], [100, 1000, 4000]
    curve = CostCurve(contexts, rows, [[passes(n, c) for n in rows] for c in contexts])
    kept = Policy(FULL, LiveCosts(curve), LiveDraftCosts({FULL: here.drafts(FULL)}))
    guesser = Guesser(**GUESSERS["middling"])
    short = play(here, guesser, auto(kept, here), 600, context=100)
    assert short.rate(first=60) > 1.2 / 0.02
    long = play(here, guesser, auto(kept, here), 900, context=9000)
    assert long.rate() > 0.95 / 0.02
    assert drafted(long) < 0.05 * len(long.settings)


def test_a_short_search_serves_where_long_ones_find_nothing():
    """The drafter knows the next token and no further."""
    passes = CURVES["flat"]
    here, kept = machine(passes), policy(passes)

    class Shortsighted(Guesser):
        def accepted(self, tree):
            return super().accepted(tree)[:2]

    log = play(here, Shortsighted(sure=0.8), auto(kept, here), 800)
    late = [setting for setting in log.settings[len(log.settings) // 2 :] if setting]
    assert np.mean([setting.length <= 3 for setting in late]) > 0.8


def test_no_time_at_all_is_survived():
    """A clock too coarse for a round."""
    passes = lambda rows, context: 1e-12
    here = machine(passes)
    log = play(here, Guesser(sure=0.5), AutoBudget(policy(passes), clock=lambda: 0.0), 300)
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
    for _ in range(8000):
        calibration.pass_round()
    np.testing.assert_allclose(calibration.probabilities(candidates), [0.6, 0.2, 0.55], atol=0.1)


def test_a_text_that_is_easier_than_others_shows_soon_and_is_forgotten_with_it():
    calibration = Calibration(depths=2)
    chain = Candidates.of(TokenTree.from_beams([[0, 1, 2]], np.log([[1.0, 0.5, 0.2]])))
    verified = np.arange(2)
    for turn in range(400):
        calibration.pass_round()
        calibration.observe(chain, verified, [0, 1][: (turn % 2) * (1 + (turn % 5 == 1))])
    before = calibration.probabilities(chain)
    np.testing.assert_allclose(before, [0.5, 0.1], atol=0.1)
    calibration.begin_text()
    for _ in range(12):
        calibration.pass_round()
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
    assert len(policy(CURVES["flat"]).choose(FULL, nothing, 100)) == 1
