"""A machine that is not known yet: its costs are found out in the first rounds of a text."""

import mlx.core as mx
import numpy as np
import pytest
from test_policy import policy as policy_of

from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.measuring.knowledge import Knowledge, knowledge_of
from redrafter_mlx.measuring.profile import load
from redrafter_mlx.pricing.budget import AutoBudget
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import MOST_NODES
from redrafter_mlx.pricing.survey import TRIES, Survey, Times
from redrafter_mlx.rounds.round import Step, Verdict
from redrafter_mlx.rounds.stats import Stats
from redrafter_mlx.rounds.tree import FILLING, TokenTree
from redrafter_mlx.target.adapter import adapt
from simulated import Guesser, Machine, answer, play
from support import generation, ids, random_drafter, tiny_prompt

FULL, FREE = Setting(4, 5), Setting(0, 5)
PLAIN = [1] * 3
ROWS = lambda rows: 1.0 + 0.1 * rows
DRAFT = lambda setting: 0.002 * setting.width


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return build("llama")


def test_every_size_is_seen_twice():
    assert answer(Survey(FULL), ROWS, DRAFT) == [*PLAIN, 2, 4, 8, 16, 16, 8, 4, 2]


@pytest.mark.parametrize("known_after", [0, 3, 5, 7])
def test_where_drafts_cannot_pay_each_size_is_seen_once(known_after):
    """Also if that is known from the first: others may have use for what passes cost."""
    survey, free = Survey(FULL), lambda rows: 1.0
    rows = answer(survey, ROWS, DRAFT, lambda rows: len(rows) < known_after)
    assert rows == [*PLAIN, 2, 4, 8, 16]
    assert survey.times.is_over
    assert set(survey.times.drafts) == {FULL, Setting(1, 5), Setting(1, 2)}
    assert answer(Survey(FULL), free, DRAFT, lambda rows: False) == rows, "none beyond 16"


def test_of_each_size_the_least_time_counts_and_more_rows_are_never_cheaper():
    compiled, seen = {8: 5.0, 16: 9.0}, set()

    def passes(rows):
        late = 0.0 if rows in seen else compiled.get(rows, 0.0)
        seen.add(rows)
        return {1: 1.0, 2: 1.4, 4: 1.3, 8: 1.6, 16: 2.1}[rows] + late

    survey = Survey(Setting(4, 12))
    answer(survey, passes, DRAFT)
    assert survey.times.costs == {1: 1.0, 2: 1.3, 4: 1.3, 8: 1.6, 16: 2.1}


def test_sizes_end_where_no_tree_can_pay():
    """With beams of five tokens a pass of six plain rounds loses whatever is accepted."""
    times = {1: 0.15, 2: 0.2, 4: 3.0, 8: 9.0, 16: 9.0}
    assert answer(Survey(FULL), times.__getitem__, DRAFT) == [*PLAIN, 2, 4, 4, 2]


def test_one_bad_moment_does_not_end_it():
    """A second time is taken of the size that looked dear, and then larger ones follow."""
    bad = iter([9.0])
    passes = lambda rows: next(bad, 1.2) if rows == 4 else ROWS(rows)
    assert answer(Survey(FULL), passes, DRAFT) == [*PLAIN, 2, 4, 4, 8, 16, 16, 8, 2]


def test_where_rows_cost_nothing_it_goes_on():
    rows = answer(Survey(FULL), lambda rows: 1.0, DRAFT)
    assert rows[-4:] == [32, 32, 64, 64]
    assert max(rows) == MOST_NODES


def test_only_drafts_where_passes_are_known():
    survey = Survey(FULL, looks=True, passes_needed=False)
    assert answer(survey, lambda rows: 1.0, DRAFT) == [2, 4, 8, 8, 4, 2]
    assert set(survey.times.drafts) == {FULL, Setting(1, 5), Setting(1, 2), FREE}


def test_what_does_not_search_is_asked_for_what_it_finds():
    survey = Survey(FULL, looks=True, searches=False)
    answer(survey, ROWS, DRAFT)
    assert set(survey.times.drafts) == {FREE}


def test_a_size_that_never_comes_is_left_out():
    """Such as trees in a cache that has no room for them."""
    survey, asked = Survey(FULL), []
    while rung := survey.next():
        asked.append(rung.rows)
        survey.passed(min(rung.rows, 4), 1.0)
    assert survey.times.costs == {1: 1.0, 2: 1.0, 4: 1.0}
    assert asked.count(16) == 2 * TRIES


def test_without_a_plain_round_it_begins_again():
    """A round of a text of one token has no end to be timed by."""
    survey = Survey(FULL)
    for _ in range(100):
        assert survey.next() is not None
    answer(survey, ROWS, DRAFT)
    assert set(survey.times.costs) == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("compiling", "sizes"),
    [(0.0, [2, 2, 4, 8, 16, 16, 8, 4, 2]), (0.5, [2, 2, 4, 4, 8, 8, 16, 16, 2])],
    ids=["warm", "compiling"],
)
def test_rounds_tell_what_the_machine_costs(compiling, sizes):
    """Of a simulated machine: what is found out are its costs, and drafting begins at once."""
    passes = lambda rows, context: 0.08 + 0.004 * rows
    here = Machine(passes, lambda setting: 0.004 * setting.width, compile=compiling)
    policy = policy_of(passes)
    policy.costs, found = None, []

    def learn(times):
        found.append(times)
        policy.costs = LiveCosts(curve_of(times))
        policy.draft_costs = LiveDraftCosts(times.drafts)

    budget = AutoBudget(policy, Survey(FULL, ended=learn), clock=lambda: here.now)
    log = play(here, Guesser(sure=0.7), budget, 200)
    (times,) = found
    assert times.costs == pytest.approx({n: 0.08 + 0.004 * n for n in (1, 2, 4, 8, 16)})
    assert times.drafts == pytest.approx({FULL: 0.016, Setting(1, 5): 0.004, Setting(1, 2): 0.004})
    assert log.nodes[: times.rounds] == [1, *PLAIN, *sizes]
    assert len(policy.samples) >= 4, "its drafts are samples too"
    assert np.mean(log.nodes[times.rounds :]) > 4


def curve_of(times):
    return CostCurve([100], list(times.costs), [list(times.costs.values())])


@pytest.mark.parametrize("texts", [2, 3, 6, 8, 12])
def test_texts_side_by_side_find_out_together(texts):
    """In turn, a round each, all from the start: every size is timed, and each text goes on."""
    passes = lambda rows, context: 0.08 + 0.004 * rows
    policy, times, ended = policy_of(passes), Times(), []
    policy.costs = None

    def learn(times):
        ended.append(times)
        policy.costs = LiveCosts(curve_of(times))
        policy.draft_costs = LiveDraftCosts(times.drafts)

    machines = [Machine(passes, lambda setting: 0.004 * setting.width) for _ in range(texts)]
    budgets = [
        AutoBudget(policy, Survey(FULL, times=times, ended=learn), clock=lambda at=at: at.now)
        for at in machines
    ]
    for _ in range(16):
        for here, budget in zip(machines, budgets, strict=True):
            play(here, Guesser(sure=0.7), budget, 1)
    assert ended == [times]
    assert times.costs == pytest.approx({n: 0.08 + 0.004 * n for n in (1, 2, 4, 8, 16)})
    assert all(budget.survey is None for budget in budgets)


def test_a_plain_round_that_looks_short_does_no_harm():
    """It ends as a text that waited for others comes to be alone: only the host's part is seen."""
    short = iter([0.001])
    survey = Survey(FULL)
    answer(survey, lambda rows: next(short, 1.0) if rows == 1 else ROWS(rows), DRAFT)
    assert survey.times.costs[1] == 1.0
    assert set(survey.times.costs) == {1, 2, 4, 8, 16}


def test_one_text_of_a_few_rounds_does_not_end_a_survey():
    """Row 1 alone is no curve: every tree would look as cheap."""
    times = Times()
    for _ in range(20):
        survey = Survey(FULL, times=times)
        assert survey.next().rows == 1 or len(times.passes[1]) == 3
        if len(times.passes[1]) < 3:
            survey.passed(1, 1.0)
        survey.next()
    assert not times.is_over
    answer(Survey(FULL, times=times), ROWS, DRAFT)
    assert set(times.costs) == {1, 2, 4, 8, 16}


def test_texts_of_other_lengths_and_searches_have_surveys_of_their_own(model):
    drafter, target = random_drafter(model), adapt(model)
    knows = Knowledge(target, drafter)
    context = lambda length: target.prefill(tiny_prompt(length), chunk=512)
    narrow = DraftOptions(beam_width=2)
    near, far, other, same = (
        knows.survey(options, context(length)).times
        for options, length in [(DraftOptions(), 9), (DraftOptions(), 300), (narrow, 9),
                                (DraftOptions(), 40)]
    )  # fmt: skip
    assert near is same
    assert len({id(near), id(far), id(other)}) == 3
    policy = knows.policy(DraftOptions(), 0.0)
    answer(knows.survey(DraftOptions(), context(9)), ROWS, DRAFT)
    assert policy.costs.curve.contexts == [8]
    survey = knows.survey(DraftOptions(), context(300))
    assert survey.times is not far, "drafts are known by now"
    answer(survey, lambda rows: 2 * ROWS(rows), DRAFT)
    assert policy.costs.curve.contexts == [8, 299]
    assert knows.survey(DraftOptions(), context(300)) is None


def test_what_fills_a_tree_up_does_not_count_as_drafted():
    """Unless it is accepted, so that there are never more accepted tokens than drafted ones."""
    tree = TokenTree.best(7, [3, 5, 5], [-1, -1, 0], [-0.1, -0.2, -0.3], 4).filled(12)
    filling = int(np.argmin(tree.logprobs))
    stats = Stats()
    for path in ([0, 1], tree.path(filling)):
        step = Step([], Verdict(path, mx.array([1]), 1), mx.zeros((1, 1)), tree, 0.0, 0.0)
        stats.read(step)
    assert (stats.nodes, stats.drafted) == (24, 3 + 4)
    assert stats.as_dict()["drafted_tokens"] == 7


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 40])
def test_a_tree_is_filled_up(rows):
    tree = TokenTree.best(7, [FILLING[0], 5, 5], [-1, -1, 0], [-0.1, -0.2, -0.3], 4)
    filled = tree.filled(rows)
    assert len(filled) == max(rows, 4)
    assert sum(map(len, filled.children)) == len(filled) - 1, "siblings differ"
    kept = {tuple(filled.tokens[path]) for path in map(filled.path, range(len(filled)))}
    assert kept >= {tuple(tree.tokens[tree.path(row)]) for row in range(len(tree))}
    assert (filled.parents[1:] < np.arange(1, len(filled))).all()
    assert filled.tokens[:3].tolist() == [7, FILLING[0], 5], "the likeliest path comes first"
    again, path = filled.without_filling([0, 1, 2])
    assert path == [0, 1, 2]
    for name in ("tokens", "parents", "logprobs"):
        assert getattr(again, name).tolist() == getattr(tree, name).tolist()
    last = len(filled) - 1
    accepted, path = filled.without_filling(filled.path(last))
    assert accepted.tokens[path].tolist() == filled.tokens[filled.path(last)].tolist()
    assert accepted.path(path[-1]) == path


@pytest.mark.parametrize("rule", ["match", "rejection", "typical"])
@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["head", "max_gram", "union"])
def test_the_first_text_is_like_any_other(model, kind, temp, rule, monkeypatch):
    """Whatever drafts and whatever rule verifies: every size is timed, filled up where needed."""
    prompt, head = tiny_prompt(), random_drafter(model)
    drafter = {
        "head": head, "max_gram": MaxGramDrafter(), "union": UnionDrafter([head, MaxGramDrafter()])
    }[kind]  # fmt: skip
    monkeypatch.setattr(Survey, "_may_pay", lambda *_: True)  # however busy this machine is
    sampling = {"temp": temp, "seed": 4, "rule": rule}
    run = generation(model, prompt, drafter, max_tokens=60, draft=DraftOptions(), **sampling)
    tokens = ids(run)
    assert set(run.stats.sizes) >= {1, 2, 4, 8, 16}
    assert not knowledge_of(adapt(model), drafter).is_first
    if rule == "match" or temp == 0:
        assert tokens == ids(generation(model, prompt, max_tokens=60, **sampling))
    assert len(tokens) == 60


def test_short_texts_share_a_survey(model):
    drafter = random_drafter(model)
    told = [
        generation(model, tiny_prompt(9), drafter, max_tokens=5, draft=DraftOptions())
        for _ in range(12)
    ]
    plain = ids(generation(model, tiny_prompt(9), max_tokens=5))
    known = []
    for run in told:
        assert ids(run) == plain
        known.append(not knowledge_of(adapt(model), drafter).is_first)
    assert not known[0]
    assert known[-1]
    assert load(knowledge_of(adapt(model), drafter)._identity).curve.contexts == [8]


def test_what_plain_decoding_would_give_is_not_known_meanwhile(model):
    run = generation(
        model, tiny_prompt(9), random_drafter(model), max_tokens=60, draft=DraftOptions()
    )
    known = [run.plain_tps is not None for _ in run]
    assert not known[0]
    assert known[-1]
