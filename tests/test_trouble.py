"""What was measured while something else used the machine: it is found out and measured anew.

Seen with one other process on one of two cores: 617 ms for a draft of 16, passes of 2 to 16 rows at
273 to 666 ms where 96 to 137 is right. Nothing was drafted, so nobody ever saw that it was wrong.
"""

import logging
from dataclasses import replace

import pytest
from test_policy import policy as policy_of

from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.measuring import knowledge as knowledge_module
from redrafter_mlx.measuring.knowledge import Knowledge
from redrafter_mlx.measuring.profile import load
from redrafter_mlx.pricing.budget import AutoBudget
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Recent, Setting
from redrafter_mlx.pricing.survey import Survey
from redrafter_mlx.target.adapter import adapt
from simulated import Guesser, Machine, answer, play
from support import random_drafter

FULL, SHORT = Setting(4, 5), Setting(1, 2)
ROWS = [1, 2, 4, 8, 16]
RIGHT = [0.080, 0.096, 0.098, 0.107, 0.137]
SLOW = [0.152, 0.214, 0.246, 0.476, 0.634]
ODD = [0.080, 0.273, 0.281, 0.397, 0.666]
DRAFTS = {FULL: 0.016, Setting(1, 5): 0.008, SHORT: 0.003}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))


def curve(seconds):
    return CostCurve([10], ROWS, [seconds])


def live(seconds) -> LiveCosts:
    return LiveCosts(curve(seconds))


def test_a_machine_that_is_faster_than_its_curve_refutes_it():
    costs = live(SLOW)
    for turn in range(LiveCosts.PROOF):
        assert not costs.is_outdated, turn
        costs.observe(1, 10, RIGHT[0])
    assert costs.is_outdated
    assert not costs.is_troubled


def test_a_machine_that_is_slower_than_its_curve_does_not():
    costs = live(RIGHT)
    for _ in range(2 * LiveCosts.PROOF):
        costs.observe(1, 10, SLOW[0])
    assert not costs.is_outdated
    assert costs.is_troubled


def test_what_drafts_took_is_forgotten_when_none_were_made_for_long():
    costs = LiveDraftCosts(DRAFTS)
    for _ in range(5):
        costs.pass_round()
        costs.observe(FULL, 0.6)
    assert costs.of(FULL) == pytest.approx(0.6)
    assert costs.least()[FULL] == pytest.approx(0.016), "that is what it can do"
    for _ in range(LiveCosts.FORGET):
        costs.pass_round()
    assert costs.of(FULL) == pytest.approx(0.016)


def told(costs, drafts, searches=True):
    """A policy that believes this, of a head that guesses well."""
    kept = policy_of(lambda rows, context: 1.0)
    kept.costs, kept.draft_costs, kept.searches = costs, drafts, searches
    return kept


@pytest.mark.parametrize(
    ("seconds", "drafts"),
    [(SLOW, DRAFTS), (ODD, DRAFTS), (RIGHT, {FULL: 0.6, Setting(1, 5): 0.1, SHORT: 0.08})],
    ids=["slow", "odd", "drafts"],
)
def test_after_trouble_it_is_looked_at_again_and_drafts_pay(seconds, drafts):
    here = Machine(
        lambda rows, context: float(curve(RIGHT).at(context, rows)[rows]),
        lambda setting: LiveDraftCosts(DRAFTS).of(setting),
        noise=0.02,
    )
    policy = told(live(seconds), LiveDraftCosts(drafts))
    looks = []

    def look_again(context):
        looks.append(context.position)
        policy.costs, policy.draft_costs = live(RIGHT), LiveDraftCosts(DRAFTS)
        return Survey.confirmed()

    budget = AutoBudget(policy, None, look_again, clock=lambda: here.now)
    log = play(here, Guesser(sure=0.7), budget, 600)
    assert len(looks) <= 1, "of drafts, one that is made tells of the others"
    assert all(position <= 100 + Recent.STALE + 16 for position in looks)
    late = log.settings[-100:]
    assert sum(setting is not None for setting in late) > 90


def test_what_stays_dear_is_looked_at_ever_less_often():
    here = Machine(
        lambda rows, context: float(curve(ODD).at(context, rows)[rows]), lambda setting: 0.016
    )
    policy = told(live(ODD), LiveDraftCosts(DRAFTS))
    looks = []

    def look_again(context):
        looks.append(context.position)
        policy.costs.untried.confirm()
        policy.draft_costs.untried.confirm()
        return Survey.confirmed()

    budget = AutoBudget(policy, None, look_again, clock=lambda: here.now)
    play(here, Guesser(sure=0.7), budget, 3000)
    assert len(looks) == 3  # after 128, 512 and 2,048 rounds


class Clocked:
    """Knowledge of a tiny model whose times are given."""

    def __init__(self, monkeypatch, passes, drafts=DRAFTS):
        self.passes, self.drafts = passes, drafts
        given = {
            "time_of_pass": lambda *_: self.passes[3],
            "time_of_draft": lambda *_: self.drafts[FULL],
        }
        for name, function in given.items():
            monkeypatch.setattr(knowledge_module, name, function)
        self.model = build("llama")
        self.drafter = random_drafter(self.model)
        self.start()

    def start(self):
        """Another process."""
        self.knows = Knowledge(adapt(self.model), self.drafter)
        self.context = adapt(self.model).prefill([1, 2, 3], chunk=512)
        self.policy = self.knows.policy(DraftOptions(), 0.0)
        self.measure(self.knows.survey(DraftOptions(), self.context))

    def measure(self, survey):
        """The rounds of a survey."""
        times = dict(zip(ROWS, self.passes, strict=True))
        answer(survey, times.__getitem__, self.drafts.__getitem__)

    def rounds(self, seconds, count=4):
        """Plain rounds, of which `seconds` is the time."""
        for _ in range(count):
            self.policy.costs.observe(1, 10, seconds)
            self.policy.costs.untried.count(False)
            self.policy.draft_costs.untried.count(False)
            self.policy.draft_costs.pass_round()

    def look_again(self):
        self.knows.PAUSE = 0
        self.measure(self.knows.look_again(DraftOptions(), self.context, self.drafter))

    @property
    def kept(self):
        self.knows.keep(10)
        return load(self.knows._identity)


def test_a_curve_of_a_slow_time_is_replaced_in_the_middle_of_a_text(monkeypatch, caplog):
    here = Clocked(monkeypatch, SLOW, {**DRAFTS, FULL: 0.1})
    assert here.kept.curve.seconds == [SLOW]
    here.start()
    here.rounds(RIGHT[0])
    assert here.kept.curve.seconds == [SLOW], "a wrong shape is not made to look right"
    here.passes, here.drafts = RIGHT, DRAFTS
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        here.look_again()
        assert here.kept
    assert "measured again, in 11 rounds, what drafts and passes cost here" in caplog.text
    assert here.policy.costs.at(10, 16)[ROWS].tolist() == pytest.approx(RIGHT)
    assert here.policy.draft_costs.of(FULL) == pytest.approx(0.016)
    assert here.kept.curve.seconds == [RIGHT]
    assert here.kept.drafts[FULL] == pytest.approx(0.016)


def test_trees_that_were_found_dear_are_tried_and_measured_again_if_they_are_not(monkeypatch):
    here = Clocked(monkeypatch, ODD)
    here.rounds(RIGHT[0], Recent.STALE)
    here.look_again()
    assert here.policy.costs.curve.seconds == [ODD], "they are dear"
    assert not here.policy.costs.untried.is_long
    here.rounds(RIGHT[0], 4 * Recent.STALE)
    here.passes = RIGHT
    here.look_again()
    assert here.policy.costs.curve.seconds == [RIGHT]


def test_the_machine_is_not_looked_at_all_the_time(monkeypatch):
    here = Clocked(monkeypatch, SLOW)
    here.rounds(RIGHT[0])
    here.passes = RIGHT
    here.knows._spent = 1000.0
    assert here.knows.look_again(DraftOptions(), here.context, here.drafter) is None
    assert here.policy.costs.curve.seconds == [SLOW]


def test_what_is_seen_in_a_slow_time_is_not_kept(monkeypatch):
    here = Clocked(monkeypatch, RIGHT)
    assert here.kept
    here.start()
    here.rounds(SLOW[0])
    for _ in range(3):
        here.policy.draft_costs.observe(FULL, 0.001)  # whatever it is
    stored = here.kept
    assert stored.curve.seconds == [RIGHT]
    assert stored.drafts == pytest.approx(DRAFTS)


def test_a_draft_so_dear_that_none_is_made_is_measured_by_the_next_process(monkeypatch):
    here = Clocked(monkeypatch, RIGHT, {**DRAFTS, FULL: 0.6})
    here.rounds(RIGHT[0])
    assert here.kept.drafts == {}
    here.drafts = DRAFTS
    here.start()
    assert here.policy.draft_costs.of(FULL) == pytest.approx(0.016)


def test_a_look_at_a_busy_machine_in_the_middle_of_a_text_is_not_kept(monkeypatch, caplog):
    here = Clocked(monkeypatch, SLOW)
    before = here.kept.as_dict()
    here.rounds(RIGHT[0])
    here.passes = [0.08, 0.9, 0.9, 2.0, 3.0]
    here.look_again()
    assert here.kept.as_dict() == before
    assert "something else is using this machine" in caplog.text


def test_profiles_of_two_contexts_stay_apart(monkeypatch):
    """What another process found at a longer context is not lost to a look at this one."""
    here = Clocked(monkeypatch, RIGHT)
    stored = here.kept
    knowledge_module.update(
        here.knows._identity,
        lambda p: replace(p, curve=stored.curve.with_context(4000, {1: 0.2, 16: 0.4})),
    )
    assert here.kept.curve.contexts == [2, 4000]
