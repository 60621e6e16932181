"""Heads that predict all depths at once are replayed as those that step are."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import heads
from families import build
from redrafter_mlx.drafters.medusa import MedusaConfig, MedusaDrafter, MedusaHead
from redrafter_mlx.drafters.text import SharedVocabulary
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Trail, Transcript
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training import replay
from support import random_drafter, tiny_prompt
from test_heads_dflash import VARIANTS, drafter_for, written


def medusa_for(model) -> MedusaDrafter:
    target, config = (
        adapt(model),
        MedusaConfig(97, 64, heads=4, blocks=1, draft_vocab_size=97, shared=True),
    )
    mx.random.seed(0)
    vocabulary = SharedVocabulary(mx.arange(97), target.logits)
    return MedusaDrafter(MedusaHead(config), vocabulary, target.tap(()), {})


@pytest.mark.parametrize("variant", [*VARIANTS, "medusa"])
def test_a_replay_drafts_what_generation_does(variant):
    """At each position of an answer, many at once, as one context after the other."""
    model, prompt = build("llama"), tiny_prompt()
    drafter = medusa_for(model) if variant == "medusa" else drafter_for(model, variant)
    answer, captured = written(model, prompt, 200)
    found = list(replay.Replayer(drafter, 1, 5).pieces(answer))
    assert [piece.count for piece, _ in found] == [200]
    tokens = found[0][1][0]
    text = [*prompt, *answer.tokens.tolist()]
    for at in (0, 1, 7, 101, 102, 103, 199):
        position, trail = len(prompt) + at, Trail()
        trail.add(captured[:position])
        context = Context(
            mx.array(text[position : position + 1]), captured[position - 1 : position], position,
            Transcript(text[: position + 1]), None, None, trail,
        )  # fmt: skip
        tree = drafter.propose(context, FixedBudget(width=1, length=5, nodes=5))
        assert tokens[at].tolist() == tree.tokens[1:].tolist()


@pytest.mark.parametrize("variant", ["dflash", "dflash2", "vanilla", "medusa"])
def test_recall_and_tokens_per_round_can_be_measured(variant):
    """A head asked for more than its block holds answers for as much as it does."""
    model = build("llama")
    drafter = medusa_for(model) if variant == "medusa" else drafter_for(model, variant)
    answer, _ = written(model, tiny_prompt(), 30)
    depths = drafter.depths
    hits = replay.recall(drafter, [answer], 9)
    assert hits.shape == (depths, len(replay.RECALL))
    assert (np.diff(hits, axis=1) >= 0).all()
    found = replay.replay(drafter, [answer], 3, 9)
    assert found.tokens == 30
    assert found.tokens_per_round[64] >= found.tokens_per_round[1] == 1


def test_a_head_that_knows_the_answer_is_found_to(monkeypatch):
    """Its recall is 1 and so are its tokens per round all that a block can give."""
    model = build("llama")
    drafter = drafter_for(model, "dflash")
    answer, _ = written(model, tiny_prompt(), 40)
    text = np.concatenate([answer.tokens, np.zeros(300, int)])

    def predict(begun, memory, pending, depths):
        places = memory[-1][None] - len(answer.prompt) + 1 + mx.arange(depths)[:, None]
        return mx.array(text)[mx.maximum(places, 0)][..., None] == mx.arange(97)

    monkeypatch.setattr(drafter, "predict", predict)
    monkeypatch.setattr(drafter, "project", lambda outputs, rows: 9 * outputs.astype(mx.float32))
    assert (replay.recall(drafter, [answer], 4) == 1).all()
    assert replay.replay(drafter, [answer], 2, 5).tokens_per_round[64] == 5


@pytest.mark.parametrize("variant", ["dflash", "dflash2", "medusa"])
def test_how_far_positions_are_filled_up_changes_no_figure(variant, monkeypatch):
    """Answers of all lengths, each as long as it is, against all of them filled up to the most."""
    model = build("llama")
    drafter = medusa_for(model) if variant == "medusa" else drafter_for(model, variant)
    answers = [written(model, tiny_prompt(), length)[0] for length in (2, 16, 17, 100)]
    figures = lambda: (
        replay.recall(drafter, answers, 4),
        replay.replay(drafter, answers, 2, 5).rounds,
        [
            [array[: piece.count] for array in found]
            for answer in answers
            for piece, found in replay.Replayer(drafter, 2, 5).pieces(answer)
        ],
    )
    sizes = lambda: [
        len(piece.roots) for a in answers for piece, _ in replay.Replayer(drafter, 2, 5).pieces(a)
    ]
    assert sizes() == [16, 16, 32, 128]
    recall, rounds, found = figures()
    monkeypatch.setattr(replay, "LEAST", replay.MOST)
    assert sizes() == [256] * 4
    recall_of_most, rounds_of_most, found_of_most = figures()
    np.testing.assert_array_equal(recall, recall_of_most)
    np.testing.assert_array_equal(rounds, rounds_of_most)
    for some, most in zip(found, found_of_most, strict=True):
        np.testing.assert_array_equal(some[0], most[0])
        np.testing.assert_allclose(some[1], most[1], atol=1e-5)
        np.testing.assert_array_equal(some[2], most[2])


def test_positions_are_filled_up_to_few_sizes():
    """Beyond the most an answer is tried in several pieces."""
    assert {replay._filled(count) for count in range(1, 257)} == {16, 32, 64, 128, 256}
    assert all(replay._filled(count) >= count for count in range(1, 257))
    model = build("llama")
    drafter = drafter_for(model, "dflash")
    answer, _ = written(model, tiny_prompt(), 270)
    pieces = [piece for piece, _ in replay.Replayer(drafter, 1, 3).pieces(answer)]
    assert [(piece.count, len(piece.roots)) for piece in pieces] == [(256, 256), (14, 16)]
    np.testing.assert_array_equal(pieces[0].ahead[-1], answer.tokens[256:258])


def test_heads_and_other_drafters_are_compared_alike():
    """A head decoded once more has the tokens per round of its replay, but for the last token."""
    model = build("llama")
    target, drafter = adapt(model), random_drafter(model, seed=3)
    answer, _ = written(model, tiny_prompt(), 120)
    found = heads.recorded(target, drafter, [answer])
    expected = replay.replay(drafter, [answer], *heads.FULL).tokens_per_round
    for budget in heads.BUDGETS:
        assert found["tree"][str(budget)] == pytest.approx(expected[budget], rel=0.02)
    chain = replay.replay(drafter, [answer], 1, heads.LENGTH).tokens_per_round
    assert found["chain"] == pytest.approx(chain[16], rel=0.02)
    assert found["tree"]["64"] > 1
