"""A union: all members' candidates in one tree, cut by one budget."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.policy import At, Told
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.protocol import candidates_of
from redrafter_mlx.drafters.union import UnionDrafter, pooled
from redrafter_mlx.pricing.budget import AutoBudget, FixedBudget
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import Policy
from redrafter_mlx.rounds.round import Context, Transcript
from redrafter_mlx.rounds.sampling import Noise
from redrafter_mlx.rounds.tree import Candidates, TokenTree


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


def budget(head: Fixed, search: float) -> AutoBudget:
    """Of a union of a head and Max-Gram, whose searches cost `search` plain rounds."""
    kept = Policy(
        Setting(4, 5),
        LiveCosts(CostCurve([0], [1, 64], [[1.0, 1.3]])),
        LiveDraftCosts({Setting(4, 5): search, Setting(0, 5): 0.001}),
        samples=[candidates_of(head, CONTEXT, 4, 5)] * 8,
        looks=True,
    )
    found = AutoBudget(kept, clock=lambda: found.now)
    found.now = 0.0
    return found


def rounds(union, found, texts, accepts) -> list[int]:
    """The turns in which the head was asked; `accepts` of the tokens after the root come true."""
    head, asked = union.members[0], []
    for turn, text in enumerate(texts):
        before = len(head.shapes)
        if found.plan(At(100)):
            tree = union.propose(replace(CONTEXT, transcript=Transcript(text)), found)
            child = tree.children[0].get(accepts)
            path = [0] if child is None else [0, child]
            searched = len(head.shapes) > before
            spent = 0.2 if searched else 0.001
            found.observe(tree, Told(len(tree), spent, path))
            found.now += spent
            asked += [turn] * searched
        found.now += 1.0
    return asked


ECHOES, SILENT = [3, 9, 4, 3], [3, 9, 4, 5]


def test_a_member_that_never_helps_is_asked_no_more_where_another_does():
    """The other one's echoes go on being verified."""
    head = Fixed({(8,): 0.7, (7,): 0.2})
    union = UnionDrafter([head, MaxGramDrafter()])
    asked = rounds(union, budget(head, 0.4), [ECHOES] * 200, accepts=9)
    assert len([turn for turn in asked if turn >= 50]) < 10


def test_where_a_search_does_not_pay_only_the_search_is_given_up():
    """The text echoes at first and then no more: Max-Gram, which is free, goes on listening."""
    head = Fixed({(8,): 0.7})
    union, found = UnionDrafter([head, MaxGramDrafter()]), budget(head, 0.2)
    asked = rounds(union, found, [ECHOES] * 6 + [SILENT] * 300, accepts=None)
    assert len(asked) < 40
    assert found.plan(At(100)), "an echo may begin anywhere"
    assert found.width == 0


def test_a_search_is_not_made_where_what_was_found_is_enough():
    head = Fixed({(5,): 0.6, (6,): 0.2})
    union, found = UnionDrafter([head, MaxGramDrafter()]), budget(head, 0.2)
    long_echo = [*range(20, 60), *range(20, 40)]
    for _ in range(3):
        found.plan(At(100))
        tree = union.propose(replace(CONTEXT, transcript=Transcript(long_echo)), found)
        found.now += 1.0
    assert head.shapes[1:] == [], "the first was a sample"
    assert tree.tokens[1] == 40
    found.plan(At(100))
    union.propose(replace(CONTEXT, transcript=Transcript(list(range(20, 60)))), found)
    assert len(head.shapes) == 2


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
