"""A union: all members' candidates in one tree, cut by one budget."""

from copy import deepcopy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from redrafter_mlx.budget import FixedBudget
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.protocol import candidates_of
from redrafter_mlx.drafters.union import UnionDrafter, pooled
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, Setting
from redrafter_mlx.pricing.policy import Policy, Survey
from redrafter_mlx.round import Context, Transcript
from redrafter_mlx.sampling import Noise
from redrafter_mlx.tree import Candidates, TokenTree


class Fixed:
    """Always scores the same paths: {path after the root: probability}."""

    def __init__(self, paths):
        self.paths, self.heard, self.shapes, self.noise = paths, [], [], []

    def propose(self, context, budget):
        self.shapes.append((budget.width, budget.length))
        self.noise.append(context.noise)
        places = {(): -1} | {path: i for i, path in enumerate(self.paths)}
        longest = max(map(len, self.paths), default=0)
        return budget.tree(
            Candidates(
                root=context.transcript.tokens[-1],
                tokens=np.array([path[-1] for path in self.paths], int),
                parents=np.array([places[path[:-1]] for path in self.paths], int),
                logprobs=np.log(np.array(list(self.paths.values()), float)),
                beams=np.array([i for p, i in places.items() if p and len(p) == longest], int),
            )
        )

    def observe(self, step):
        self.heard.append(step)

    def reset(self):
        self.heard.append("reset")


CONTEXT = Context(mx.array([3]), mx.zeros((1, 4)), 2, Transcript([1, 2, 3]), None)
HEAD = {(5,): 0.6, (6,): 0.2, (5, 7): 0.3, (5, 8): 0.1}
ECHO = {(5,): 0.4, (5, 9): 0.35, (5, 9, 4): 0.3, (2,): 0.05}


def paths_of(tree: TokenTree) -> dict[tuple, float]:
    return {
        tuple(tree.tokens[tree.path(row)][1:].tolist()): round(float(np.exp(tree.logprobs[row])), 4)
        for row in range(1, len(tree))
    }


def test_the_likeliest_of_all_candidates_are_verified():
    tree = UnionDrafter([Fixed(HEAD), Fixed(ECHO)]).propose(CONTEXT, FixedBudget(4, 5, 5))
    assert tree.tokens[0] == 3
    assert paths_of(tree).keys() == {(5,), (5, 9), (5, 9, 4), (6,)}


def test_with_room_enough_nothing_is_lost_and_nothing_is_there_twice():
    tree = UnionDrafter([Fixed(HEAD), Fixed(ECHO)]).propose(CONTEXT, FixedBudget(4, 5, 64))
    assert paths_of(tree).keys() == (ECHO | HEAD).keys()


def test_opinions_are_pooled_by_hand():
    """Of the root's children 5 is named by both, 6 by one; (5, 9) has one child, of one member."""
    found = pooled([candidates_of(Fixed(paths), CONTEXT, 4, 5) for paths in (HEAD, ECHO)])
    power = 2**-0.7
    five, six = (0.6 * 0.4) ** power, (0.2 * 0.3 * 0.55) ** power
    two, others = (0.3 * 0.2 * 0.05) ** power, 0.6 * (0.2 * 0.55) ** power
    probs = dict(zip(found.tokens.tolist(), np.exp(found.logprobs).tolist(), strict=True))
    assert probs[5] == pytest.approx(five / (five + six + two + others))
    assert probs[6] == pytest.approx(six / (five + six + two + others))
    assert probs[4] / probs[9] == pytest.approx(0.3 / 0.35)


def test_what_both_are_sure_of_is_likelier_and_what_one_denies_is_less_likely():
    sure = {(5,): 0.8, (6,): 0.1}
    prob = lambda *members: float(
        np.exp(pooled([candidates_of(Fixed(m), CONTEXT, 4, 5) for m in members]).logprobs[0])
    )
    assert prob(sure, {(5,): 0.8}) > prob(sure) > prob(sure, {(7,): 0.8})
    assert prob(sure, {(5,): 1.0}) <= 1


def test_the_order_of_the_members_does_not_matter():
    one = UnionDrafter([Fixed(HEAD), Fixed(ECHO)]).propose(CONTEXT, FixedBudget(4, 5, 6))
    other = UnionDrafter([Fixed(ECHO), Fixed(HEAD)]).propose(CONTEXT, FixedBudget(4, 5, 6))
    assert paths_of(one) == paths_of(other)


def test_the_papers_budget_takes_the_beams_of_every_member():
    """Beams of different lengths: (5, 7), (5, 8) and (5, 9, 4)."""
    tree = UnionDrafter([Fixed(HEAD), Fixed(ECHO)]).propose(CONTEXT, FixedBudget(4, 5, 0))
    assert paths_of(tree).keys() == {(5,), (5, 7), (5, 8), (5, 9), (5, 9, 4)}


@pytest.mark.parametrize("nodes", [0, 16])
def test_a_member_without_an_idea_changes_nothing(nodes):
    budget = FixedBudget(4, 5, nodes)
    alone = Fixed(HEAD).propose(CONTEXT, budget)
    united = UnionDrafter([Fixed({}), Fixed(HEAD), MaxGramDrafter()]).propose(CONTEXT, budget)
    assert paths_of(united) == paths_of(alone)
    assert len(UnionDrafter([Fixed({}), Fixed({})]).propose(CONTEXT, budget)) == 1


def test_members_search_as_far_as_the_budget_says_and_hear_what_became_of_it():
    members = [Fixed(HEAD), Fixed(ECHO)]
    union = UnionDrafter(members)
    union.reset()
    union.propose(CONTEXT, FixedBudget(3, 7, 16))
    union.observe("step")
    assert [(m.shapes, m.heard) for m in members] == [([(3, 7)], ["reset", "step"])] * 2


def test_members_reckon_with_noise_but_do_not_draw():
    """Draws among candidates of others are draws no longer."""
    coupled = Noise(mx.zeros(2, mx.uint32), mx.array(1.0))
    for noise, given in ((coupled, coupled), (replace(coupled, coupled=False), None)):
        member = Fixed(HEAD)
        context = replace(CONTEXT, noise=noise)
        UnionDrafter([member, Fixed(ECHO)]).propose(context, FixedBudget(4, 5, 16))
        assert member.noise == [given]


def test_a_member_that_gives_a_finished_tree_is_understood():
    class Finished(Fixed):
        def propose(self, context, budget):
            return super().propose(context, FixedBudget(4, 5, 64))

    tree = UnionDrafter([Finished(HEAD), Fixed(ECHO)]).propose(CONTEXT, FixedBudget(4, 5, 64))
    assert paths_of(tree).keys() == (ECHO | HEAD).keys()


def test_without_a_search_only_those_that_need_none_are_asked():
    head, context = Fixed(HEAD), replace(CONTEXT, transcript=Transcript([3, 9, 4, 3]))
    union = UnionDrafter([head, MaxGramDrafter()])
    tree = union.propose(context, FixedBudget(0, 5, 3))
    assert (head.shapes, tree.tokens.tolist()) == ([], [3, 9, 4])


def test_a_member_that_never_helps_is_asked_no_more_where_another_does():
    """But for a survey now and then; the other one's echoes go on being verified."""
    policy = Policy(Setting(4, 5), LiveCosts(CostCurve([0], [1, 64], [[1.0, 1.3]])))
    context = replace(CONTEXT, transcript=Transcript([3, 9, 4, 3]))
    head = Fixed({(8,): 0.7, (7,): 0.2})
    union = UnionDrafter([head, MaxGramDrafter()])
    for _ in range(2):
        policy.draft_costs.observe(Setting(4, 5), 0.4)
    policy.costs.observe(1, 100, 1.0)  # else a plain round is timed first
    for _ in range(200):
        setting = policy.plan(100)
        candidates = candidates_of(union, context, *setting)
        tree = policy.choose(setting, candidates, 100)
        echo = tree.children[0].get(9)
        policy.observe(tree, [0] if echo is None else [0, echo])
    assert len(head.shapes) < 35
    assert policy.setting.width == 0


def test_where_a_search_does_not_pay_only_the_search_is_parked():
    """The text echoes at first and then no more: Max-Gram, which is free, goes on listening."""
    policy = Policy(Setting(4, 5), LiveCosts(CostCurve([0], [1, 64], [[1.0, 1.3]])))
    policy.costs.observe(1, 100, 1.0)
    head = Fixed({(8,): 0.7})
    union = UnionDrafter([head, MaxGramDrafter()])
    searches, planned = [], []
    for turn in range(300):
        setting = policy.plan(100)
        planned.append(setting)
        if setting is None:
            continue
        policy.draft_costs.observe(setting, 0.2 if setting.width else 0.001)
        transcript = Transcript([3, 9, 4, 3] if turn < 6 else [3, 9, 4, 5])
        before = len(head.shapes)
        candidates = candidates_of(union, replace(CONTEXT, transcript=transcript), *setting)
        searches += [turn] * (len(head.shapes) - before)
        policy.observe(policy.choose(setting, candidates, 100), [0])
    assert None not in planned
    assert not policy.is_parked
    assert len(searches) < 20
    assert max(np.diff(searches)) >= 2 * Policy.FIRST_PAUSE, "the pauses of the search double"
    policy.begin_text()
    assert policy.plan(100) == policy.full, "another text: it may pay there"


def test_another_text_is_searched_whenever_it_begins():
    """Also when the pause of a parked search is nearly over."""
    policy = Policy(Setting(4, 5), LiveCosts(CostCurve([0], [1, 64], [[1.0, 1.3]])))
    policy.costs.observe(1, 100, 1.0)
    union, pauses = UnionDrafter([Fixed({(8,): 0.7}), MaxGramDrafter()]), 0
    for turn in range(80):
        setting = policy.plan(100)
        if setting.width == 0:
            pauses += 1
            another = deepcopy(policy)
            another.begin_text()
            assert another.plan(100) == policy.full, turn
        policy.draft_costs.observe(setting, 0.2 if setting.width else 0.001)
        transcript = Transcript([3, 9, 4, 3] if turn < 6 else [3, 9, 4, 5])
        candidates = candidates_of(union, replace(CONTEXT, transcript=transcript), *setting)
        policy.observe(policy.choose(setting, candidates, 100), [0])
    assert pauses > Policy.FIRST_PAUSE


def test_what_any_search_finds_is_marked_so():
    """So that a shorter search is not thought to lose a long echo."""
    index = MaxGramDrafter()
    context = replace(CONTEXT, transcript=Transcript([5, 9, 4, 1, 2, 3, 5, 9, 4, 1, 2, 3]))
    found = candidates_of(UnionDrafter([Fixed(HEAD), index]), context, 4, 5)
    of_head = np.isin(found.tokens, [6, 7, 8])
    assert of_head.any()
    assert not found.always[of_head].any()
    assert found.always[~of_head].all()
    assert found.depths[found.always].max() > 5
    survey = Survey(found, [Setting(0, 5), Setting(1, 2), Setting(4, 5)], Setting(4, 5))
    assert survey.found[0, 5].tolist() == np.flatnonzero(found.always).tolist()
    assert set(np.flatnonzero(found.always)) <= set(survey.found[1, 2])
    assert len(survey.found[4, 5]) == len(found.tokens)
