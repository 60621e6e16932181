"""The cascade: calls, tokens and rounds exactly as the paper's recursion says."""

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.protocol import Written
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Transcript
from redrafter_mlx.rounds.tree import Candidates
from support import generation, ids, random_drafter, tiny_prompt

WIDE = FixedBudget(4, 5, 64)


class ScriptedLevel:
    """Knows how the text goes on, up to `right` tokens at a time; then it is wrong.

    truth    the whole text
    right    of each run of tokens that it writes, how many are true
    reviews  whether it can review; then it lets pass what is true and adds a true token
    """

    def __init__(self, name, log, truth, right=99):
        self.name, self.log, self.truth, self.right = name, log, truth, right

    def begin(self, context):
        self.place = context.position + 1

    def write(self, ahead, most):
        self.log.append((self.name, "write", len(ahead), most))
        at = self.place + len(ahead)
        tokens = [self.truth[at + i] + (0 if i < self.right else 1) for i in range(most)]
        return Written(tokens, [0.9] * most, [1.0] * most)

    def observe(self, step):
        self.log.append((self.name, "observe", step))

    def reset(self):
        self.log.append((self.name, "reset"))


class ScriptedModel(ScriptedLevel):
    def review(self, ahead, drafted, lenience):
        self.log.append((self.name, "review", len(ahead), len(drafted.tokens), lenience))
        at = self.place + len(ahead)
        passed = 0
        while passed < len(drafted.tokens) and drafted.tokens[passed] == self.truth[at + passed]:
            passed += 1
        tokens = self.truth[at : at + passed + 1]
        return Written(tokens, [0.8] * len(tokens), [0.8] * len(tokens))


TRUTH = list(range(10, 90, 2))


def context(verified=3):
    transcript = Transcript(TRUTH[:verified])
    pending = mx.array(TRUTH[verified - 1 : verified])
    return Context(pending, mx.zeros((1, 4)), verified - 1, transcript, None)


def run(k, *kinds, lenience=1.0):
    """The log of one proposal and the tokens of its chain. kinds: (class, right)."""
    log = []
    levels = [kind("ABC"[i], log, TRUTH, right) for i, (kind, right) in enumerate(kinds)]
    tree = CascadeDrafter(levels, k, lenience).propose(context(), WIDE)
    assert tree.is_chain
    assert tree.tokens[0] == TRUTH[2]
    return log, tree.tokens[1:].tolist()


def test_horizontal_later_tokens_come_from_the_cheaper_level():
    log, tokens = run([[3, 4], [0, 0]], (ScriptedModel, 99), (ScriptedLevel, 99))
    assert log == [("A", "write", 0, 3), ("B", "write", 3, 4)]
    assert tokens == TRUTH[3:10]


def test_vertical_a_level_reviews_what_the_cheaper_one_writes():
    """B is right twice: each review gives A three tokens, so five take two reviews and make six."""
    log, tokens = run([[5, 0], [0, 4]], (ScriptedModel, 99), (ScriptedLevel, 2), lenience=3.0)
    assert log == [
        ("B", "write", 0, 4),
        ("A", "review", 0, 4, 3.0),
        ("B", "write", 3, 4),
        ("A", "review", 3, 4, 3.0),
    ]
    assert tokens == TRUTH[3:9]


def test_the_papers_example_does_both():
    """k [[5, 10], [0, 10]]: one review gives eleven tokens; four more make fifteen."""
    log, tokens = run([[5, 10], [0, 10]], (ScriptedModel, 99), (ScriptedLevel, 99))
    assert log == [("B", "write", 0, 10), ("A", "review", 0, 10, 1.0), ("B", "write", 11, 4)]
    assert tokens == TRUTH[3:18]


def test_three_levels():
    """A has B review C's tokens, twice, and reviews the result; then B with C, then C alone."""
    k = [[4, 3, 2], [0, 4, 1], [0, 0, 2]]
    log, tokens = run(k, (ScriptedModel, 99), (ScriptedModel, 99), (ScriptedLevel, 1))
    assert log == [
        # a draft for A: B until there are 4 (two reviews of C's 2, one of them right), C until 5
        ("C", "write", 0, 2),
        ("B", "review", 0, 2, 1.0),
        ("C", "write", 2, 2),
        ("B", "review", 2, 2, 1.0),
        ("C", "write", 4, 1),
        ("A", "review", 0, 5, 1.0),
        # 6 of 4 + 3 tokens are there: B adds until there are 7, C until there are 9
        ("C", "write", 6, 2),
        ("B", "review", 6, 2, 1.0),
        ("C", "write", 8, 1),
    ]
    assert tokens == TRUTH[3:12]


def test_wrong_tokens_are_replaced_in_review_and_left_to_the_target_at_the_end():
    log, tokens = run([[1, 2], [0, 3]], (ScriptedModel, 99), (ScriptedLevel, 0))
    assert log == [("B", "write", 0, 3), ("A", "review", 0, 3, 1.0), ("B", "write", 1, 2)]
    assert tokens == [TRUTH[3], TRUTH[4] + 1, TRUTH[5] + 1]


def test_a_level_without_an_idea_ends_its_part():
    class Silent(ScriptedLevel):
        def write(self, ahead, most):
            super().write(ahead, most)
            return Written()

    log, tokens = run([[2, 5], [0, 3]], (ScriptedModel, 99), (Silent, 0))
    assert tokens == TRUTH[3:5]
    assert log.count(("A", "review", 0, 0, 1.0)) == 1
    assert log.count(("A", "review", 1, 0, 1.0)) == 1
    assert log[-1] == ("B", "write", 2, 5)


def test_a_head_comes_first_and_its_best_beam_is_written_on():
    class Head:
        def propose(self, context, budget):
            assert (budget.width, budget.length) == (4, 3)
            return budget.tree(
                Candidates(
                    root=TRUTH[2],
                    tokens=np.array([TRUTH[3], 7, TRUTH[4]]),
                    parents=np.array([-1, -1, 0]),
                    logprobs=np.log([0.6, 0.3, 0.5]),
                    beams=np.array([2]),
                )
            )

    log = []
    level = ScriptedLevel("B", log, TRUTH)
    tree = CascadeDrafter([Head(), level], [[2, 3], [0, 0]], 1.0).propose(context(), WIDE)
    assert log == [("B", "write", 2, 3)]
    paths = {tuple(tree.tokens[path][1:].tolist()) for path in tree.paths()}
    assert paths == {tuple(TRUTH[3:8]), (7,)}
    np.testing.assert_allclose(
        np.exp(tree.logprobs[:6]), [1, 0.6, 0.5, 0.45, 0.405, 0.3645], rtol=1e-5
    )


def test_all_levels_hear_of_rounds_and_prompts():
    log = []
    cascade = CascadeDrafter([ScriptedModel(n, log, TRUTH) for n in "AB"], [[1, 1], [0, 0]], 1.0)
    cascade.reset()
    cascade.observe("step")
    assert log[:2] == [("A", "reset"), ("B", "reset")]
    assert log[2:] == [("A", "observe", "step"), ("B", "observe", "step")]


# ---------------------------------------------------------------------------------------------
# With models


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize("sampling", [{}, {"temp": 0.8, "seed": 4}])
@pytest.mark.parametrize(("k", "tokens"), [([[4, 0], [0, 3]], 4), ([[3, 0], [0, 0]], 3)])
def test_a_perfect_model_has_its_whole_draft_accepted(model, sampling, k, tokens):
    """The target as its own draft model: at least k tokens are accepted in each round."""
    drafter = CascadeDrafter([ModelDrafter(model, 97), MaxGramDrafter()], k, 1.0)
    prompt = tiny_prompt(9)
    run = generation(model, prompt, drafter, max_tokens=40, **sampling)
    text = ids(run)
    assert text == ids(generation(model, prompt, max_tokens=40, **sampling))
    assert run.stats.rounds <= -(-40 // (tokens + 1))


def test_lenience_lets_more_pass_and_changes_no_text(model):
    """The more lenient the review, the longer the drafts and the fewer of them are right."""
    other, prompt = build("llama", seed=1), tiny_prompt(9)
    plain = ids(generation(model, prompt, max_tokens=60))
    passes = []
    for lenience in (1.0, 1000.0):
        drafter = CascadeDrafter(
            [ModelDrafter(model, 97), ModelDrafter(other, 97)], [[6, 0], [0, 3]], lenience
        )
        run = generation(model, prompt, drafter, max_tokens=60)
        assert ids(run) == plain
        passes.append((drafter.members[0].passes / run.stats.rounds, run.stats.rounds))
    assert passes[1][0] < passes[0][0]
    assert passes[1][1] > passes[0][1]


def test_a_head_a_model_and_max_gram(model):
    levels = [random_drafter(model), ModelDrafter(build("llama", seed=1), 97), MaxGramDrafter()]
    drafter = CascadeDrafter(levels, [[2, 2, 3], [0, 0, 0], [0, 0, 4]], 2.0)
    prompt = tiny_prompt(9)
    plain = ids(generation(model, prompt, max_tokens=30))
    assert ids(generation(model, prompt, drafter, max_tokens=30)) == plain
