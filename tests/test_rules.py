"""Which distribution each rule draws from: 40,000 draws over a small vocabulary."""

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Outcome, Transcript
from redrafter_mlx.rounds.sampling import Sampler, gumbel, seed_key
from redrafter_mlx.rounds.stats import Stats
from redrafter_mlx.rounds.tree import DrawnTree, TokenTree
from redrafter_mlx.rounds.verification import Match, Rejection, Typical
from support import ScriptedDrafter, generation, ids, random_drafter, tiny_prompt

V, DRAWS, TEMP = 8, 40_000, 0.8
pytestmark = pytest.mark.usefixtures("compiled")
WIDTH = 3

RNG = np.random.default_rng(5)
TARGET = RNG.normal(size=(V + 1, V)).astype(np.float32) * 1.5
"""Logits after the pending token (row V) and after each token: what the target says."""
DRAFT = RNG.normal(size=(V + 1, V)).astype(np.float32) * 1.5
"""The same of a drafter that knows little about it."""


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


P = softmax(TARGET / TEMP)
Q = softmax(DRAFT / TEMP)


def drawn_without_replacement(draws):
    """(draws, 2, W) tokens as `draw` draws them, all at once; a key of their own."""
    at = np.arange(draws, dtype=np.uint32)[:, None]
    every = np.arange(V, dtype=np.uint32)[None]
    first = np.argsort(-(np.log(Q[V]) + gumbel(seed_key(77), 2 * at, every)), axis=1)
    chosen = np.log(Q[first[:, 0]])
    second = np.argsort(-(chosen + gumbel(seed_key(77), 2 * at + 1, every)), axis=1)
    return np.stack([first[:, :WIDTH], second[:, :WIDTH]], axis=1)


def likeliest(draws, probs=Q):
    """(draws, 2, W): the likeliest tokens, a drafter's or the target's own; the same each time."""
    first = np.argsort(-probs[V])[:WIDTH]
    second = np.argsort(-probs[first[0]])[:WIDTH]
    return np.broadcast_to(np.stack([first, second]), (draws, 2, WIDTH))


def emitted(rule, tokens, drawn):
    """(draws, 2) what one round emits at the first two places; -1 where it ended before.

    tokens  (draws, 2, W): the children of the root, and of its first child
    drawn   whether the tree says that its tokens were drawn from Q
    """
    out = np.full((len(tokens), 2), -1)
    nothing, transcript = (mx.array([0]), mx.zeros((1, 1))), Transcript([0])
    passes = {}  # the tree of each draft, and what the target says about it
    for i, both in enumerate(tokens):
        if (drafted := both.tobytes()) not in passes:
            tree = tree_of(both, np.log(Q[[V, both[0, 0]]]) if drawn else None)
            logits = mx.array(TARGET[[V, *tree.tokens[1:]]])
            passes[drafted] = tree, Outcome(logits, nothing[1])
        tree, outcome = passes[drafted]
        verdict = rule(tree, outcome, Context(*nothing, 3 * i, transcript, None))
        said = [*tree.tokens[verdict.path[1:]].tolist(), verdict.token][:2]
        out[i, : len(said)] = said
    return out


def tree_of(tokens, logprobs):
    """The tree of drawn (2, W) tokens; without `logprobs` it does not say that they were drawn."""
    ids = np.append(0, tokens.reshape(-1)[SHAPE.tokens[1:]])
    nodes = ids, SHAPE.parents, SHAPE.logprobs
    if logprobs is None:
        return TokenTree(*nodes)
    return DrawnTree(*nodes, np.arange(V), np.exp(logprobs), SHAPE.sources)


SHAPE = drawn_tree(
    0, np.arange(V), np.arange(2 * WIDTH).reshape(2, WIDTH), np.zeros((2, V)), FixedBudget(3, 3, 64)
)
"""The tree of two depths; its tokens say which drawn token stands in each row."""


def chi_squares(said):
    """(statistic, degrees of freedom) of the first token, and of the second after each first."""
    counts = np.bincount(said[:, 0], minlength=V)
    expected = P[V] * len(said)
    yield ((counts - expected) ** 2 / expected).sum(), V - 1
    both = said[said[:, 1] >= 0]
    total, degrees = 0.0, 0
    for first in range(V):
        after = both[both[:, 0] == first, 1]
        expected = P[first] * len(after)
        if len(after) and expected.min() >= 5:
            counts = np.bincount(after, minlength=V)
            total += ((counts - expected) ** 2 / expected).sum()
            degrees += V - 1
    assert degrees, "too few second tokens to judge"
    yield total, degrees


def judge(rule, tokens, drawn):
    """Whether both distributions pass, and the statistics."""
    results = list(chi_squares(emitted(rule, tokens, drawn)))
    return all(s < critical(d) for s, d in results), results


def critical(degrees):
    """Exceeded about once in 10,000 times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * np.sqrt(2 / (9 * degrees))) ** 3


SAMPLER = Sampler(SamplingOptions(temp=TEMP, seed=1))


class ForgetsTheResidual(Rejection):
    """A known-wrong rule: after rejections it draws from p as if there had been none."""

    def _token(self, tree, node, p, uniform):
        token = super()._token(tree, node, p, uniform)
        if token in tree.children[node]:
            return token
        return int(uniform.choice(len(p), p=p))


@pytest.fixture(scope="module")
def drawn():
    return drawn_without_replacement(DRAWS)


def test_critical_values():
    for degrees, exact in ((7, 29.88), (14, 42.58), (50, 95.97)):
        assert critical(degrees) == pytest.approx(exact, rel=0.02)


def test_match_is_exact():
    passed, results = judge(Match(SAMPLER), likeliest(DRAWS), drawn=False)
    assert passed, results


def test_rejection_is_exact_over_drawn_drafts(drawn):
    passed, results = judge(Rejection(SAMPLER), drawn, drawn=True)
    assert passed, results


def test_rejection_is_exact_over_sure_drafts():
    passed, results = judge(Rejection(SAMPLER), likeliest(DRAWS), drawn=False)
    assert passed, results


def test_likeliest_tokens_that_claim_to_be_drawn_are_caught():
    """The rule of the reference implementation: p/q on beam tokens."""
    passed, results = judge(Rejection(SAMPLER), likeliest(20_000), drawn=True)
    assert not passed
    assert results[0][0] > 10 * critical(V - 1)


def test_a_forgotten_residual_is_caught(drawn):
    passed, results = judge(ForgetsTheResidual(SAMPLER), drawn[:20_000], drawn=True)
    assert not passed
    assert results[0][0] > 10 * critical(V - 1)


def test_typical_acceptance_is_not_exact():
    """It says that it is lossy, and it is: over the target's own likeliest tokens."""
    tokens = likeliest(8_000, P)
    assert judge(Match(SAMPLER), tokens, drawn=False)[0]
    assert not judge(Typical(SAMPLER), tokens, drawn=False)[0]


def test_drafts_drawn_from_q_are_accepted_more_often_than_sure_ones_where_q_is_p(drawn):
    """With q = p the first draw is always accepted."""
    rule = Rejection(SAMPLER)
    for i in range(200):
        tokens = drawn[i]
        tree = tree_of(tokens, np.log(Q[[V, tokens[0, 0]]]))
        rows = DRAFT[[V, *tree.tokens[1:]]]
        context = Context(mx.array([0]), mx.zeros((1, 1)), i, Transcript([0]), None)
        verdict = rule(tree, Outcome(mx.array(rows), mx.zeros((1, 1))), context)
        assert tree.tokens[verdict.path].tolist() == [0, tokens[0, 0], tokens[1, 0]]


# ---------------------------------------------------------------------------------------------
# Drawing


def test_draws_are_gumbel_top_k():
    """`draw` on the device gives what adding noise and sorting gives."""
    rows = {None: DRAFT[V]} | {token: DRAFT[token] for token in range(V)}
    for i in range(20):
        tokens, logprobs = draw(
            lambda last: mx.array(rows[None if last is None else last.item()])[None],
            mx.arange(V),
            mx.array(seed_key(77)),
            mx.array(TEMP),
            mx.array([i], dtype=mx.uint32),
            WIDTH,
            3,
        )
        at = np.array([[i + 1]], np.uint32)
        noise = gumbel(seed_key(77), at, np.arange(V, dtype=np.uint32)[None])
        assert tokens[0].tolist() == np.argsort(-(np.log(Q[V]) + noise[0]))[:WIDTH].tolist()
        first = tokens[0, 0].item()
        np.testing.assert_allclose(np.exp(np.array(logprobs)), Q[[V, first]], atol=1e-5)


def test_what_is_kept_of_a_drawn_tree_depends_on_places_only():
    q = np.zeros((2, V))
    trees = [
        drawn_tree(0, np.arange(V), np.array(tokens), q, FixedBudget(3, 3, 4))
        for tokens in ([[1, 2, 3], [4, 5, 6]], [[6, 0, 1], [1, 7, 2]])
    ]
    assert trees[0].parents.tolist() == trees[1].parents.tolist()
    assert trees[0].tokens.tolist() == [0, 1, 4, 2]
    assert trees[0].sources.tolist() == [0, 1, -1, -1]
    assert isinstance(trees[0], DrawnTree)


def test_no_draw_is_left_out_that_others_were_drawn_after():
    """Whichever nodes a budget likes: of each depth the first draws are kept."""

    class Odd(FixedBudget):
        def tree(self, candidates):
            c = candidates
            some = np.isin(c.tokens, [1, 3, 5])
            parents = np.where(c.parents[some] >= 0, 0, -1)
            return TokenTree.best(c.root, c.tokens[some], parents, c.logprobs[some], 9)

    tree = drawn_tree(
        0, np.arange(V), np.array([[1, 2, 3], [4, 5, 6]]), np.zeros((2, V)), Odd(3, 3, 9)
    )
    assert tree.tokens.tolist() == [0, 1, 4, 2]


@pytest.mark.parametrize("kind", ["head", "reduced head", "model"])
def test_siblings_of_real_drafters_are_drawn_from_what_they_say(kind):
    """Over many positions the first draw has the distribution that the tree claims."""
    model = build("llama")
    drafter = {
        "head": lambda: random_drafter(model),
        "reduced head": lambda: random_drafter(model, d2t=np.arange(0, 97, 3)),
        "model": lambda: ModelDrafter(build("llama", seed=1), 97),
    }[kind]()
    noise = Sampler(SamplingOptions(temp=1.0, seed=3, rule="rejection")).noise
    claimed, counts = [], []
    for seed in range(60):
        text = Transcript(tiny_prompt(6, seed))
        hidden = mx.random.normal((1, 64), key=mx.random.key(seed))
        context = Context(mx.array(text.tokens[-1:]), hidden, 5 + seed, text, None, noise)
        tree = drafter.propose(context, FixedBudget(4, 3, 64))
        assert len(tree) == 1 + 2 * 4
        probs = np.zeros(97)
        probs[tree.ids] = tree.probs[0]
        assert probs.sum() == pytest.approx(1, abs=1e-4)
        siblings = tree.tokens[tree.parents == 0]
        assert len(set(siblings.tolist())) == 4
        claimed.append(probs)
        counts.append(np.eye(97)[next(iter(tree.children[0]))])
    claimed, counts = np.array(claimed), np.array(counts)
    score = lambda drawn: (drawn * np.log(np.maximum(claimed, 1e-9))).sum(axis=1).mean()
    expected = (claimed * np.log(np.maximum(claimed, 1e-9))).sum(axis=1)
    variance = (claimed * np.log(np.maximum(claimed, 1e-9)) ** 2).sum(axis=1) - expected**2
    assert abs(score(counts) - expected.mean()) < 4 * np.sqrt(variance.sum()) / len(counts)


# ---------------------------------------------------------------------------------------------
# In generation


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def make(model):
    """Makes a fresh drafter of a kind."""
    other = build("llama", seed=1)
    kinds = {
        "none": lambda: None,
        "head": lambda: random_drafter(model),
        "model": lambda: ModelDrafter(other, 97),
        "max_gram": MaxGramDrafter,
    }
    return lambda name: kinds[name]()


@pytest.mark.parametrize("name", ["none", "head", "model", "max_gram"])
def test_at_temperature_0_every_rule_gives_the_greedy_text(model, make, name):
    prompt = tiny_prompt(9)
    plain = ids(generation(model, prompt))
    for rule in ("rejection", "typical"):
        assert ids(generation(model, prompt, make(name), rule=rule)) == plain


@pytest.mark.parametrize("name", ["none", "head", "model", "max_gram"])
@pytest.mark.parametrize("rule", ["rejection", "typical"])
def test_the_same_seed_and_drafter_give_the_same_text(model, make, rule, name):
    prompt = tiny_prompt(9)
    text = lambda seed: ids(generation(model, prompt, make(name), temp=0.9, seed=seed, rule=rule))
    assert text(1) == text(1) != text(2)


def test_filters_hold_for_every_rule(model, make):
    """With top_k = 2 no token comes that is not among the two likeliest."""
    prompt = tiny_prompt(9)
    for rule in ("match", "rejection"):
        for name in ("none", "head", "model", "max_gram"):
            tokens = ids(
                generation(model, prompt, make(name), temp=1.5, seed=4, top_k=2, rule=rule)
            )
            logits = np.array(model(mx.array([[*prompt, *tokens]]))[0])
            for i, token in enumerate(tokens):
                row = logits[len(prompt) - 1 + i]
                assert (row > row[token]).sum() < 2, (rule, name)


def test_typical_accepts_more_than_the_model_would_say(model):
    """A draft of the second likeliest tokens is accepted now and then."""
    prompt = tiny_prompt(9)
    plain = ids(generation(model, prompt, max_tokens=60))
    script = ScriptedDrafter(prompt + plain, right=4)
    counts = {}
    for rule in ("match", "typical"):
        run = generation(model, prompt, script, max_tokens=60, temp=1.0, seed=2, rule=rule)
        ids(run)
        counts[rule] = sum(run.stats.accepted_at)
    assert counts["typical"] > counts["match"]


def test_typical_takes_the_longest_path_that_passes():
    tree = TokenTree.best(0, [1, 2, 3, 4], [-1, -1, 1, 0], [-1.0, -2.0, -3.0, -9.0], budget=5)
    logits = np.full((len(tree), V), -9.0, np.float32)
    logits[0, [1, 2]] = 1.0
    row_of = {int(token): row for row, token in enumerate(tree.tokens)}
    logits[row_of[1], 7] = 5.0  # so 4, its child, does not pass
    logits[row_of[2], 3] = 5.0
    logits[row_of[3], 6] = 9.0
    context = Context(mx.array([0]), mx.zeros((1, 1)), 0, Transcript([0]), None)
    verdict = Typical(SAMPLER)(tree, Outcome(mx.array(logits), mx.zeros((1, 1))), context)
    assert tree.tokens[verdict.path].tolist() == [0, 2, 3]
    assert verdict.token == 6


def test_medusas_threshold():
    rule = Typical(SAMPLER)
    sure = np.array([0.97, 0.02, 0.01])
    assert [rule.passes(sure, token) for token in range(3)] == [True, False, False]
    flat = np.full(100, 0.01)  # entropy log 100: the threshold is 0.3 / 100
    assert rule.passes(flat, 3)
    half = np.array([0.5, 0.4, 0.08, 0.02])
    assert [rule.passes(half, token) for token in range(4)] == [True, True, False, False]


def test_the_label():
    assert "typical (lossy)" in Stats(rule="typical").summary()
    assert "typical (lossy)" in Stats(rule="typical").report()
    assert Stats(rule="typical").as_dict()["rule"] == "typical (lossy)"
    assert "lossy" not in Stats(rule="rejection").report()
    assert "rejection" in Stats(rule="rejection").report()
    assert "rule" not in Stats().summary()


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="--rule must be one of match, rejection, typical"):
        SamplingOptions(rule="medusa")
