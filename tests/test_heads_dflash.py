"""DFlash, DFlash 2 and DSpark, against what their authors' own code computes (fixtures/heads)."""

import math
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from families import build
from redrafter_mlx.drafters import dflash
from redrafter_mlx.drafters.attention import CHUNK
from redrafter_mlx.drafters.block import BlockConfig, BlockHead, BlockText, MarkovHead, Sight, seen
from redrafter_mlx.drafters.dflash import DFlashDrafter, LinkedDrafter
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.drafters.text import SharedVocabulary
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Trail, Transcript, View
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training import replay
from support import ScriptedDrafter, generation, ids, tiny_prompt

HEADS = Path(__file__).parent / "fixtures" / "heads"
NAMES = ("dflash", "dflash_sliding", "dflash2", "dspark")
LINKED = ("dflash2", "dspark")


def fixture(name: str) -> tuple[DFlashDrafter, dict[str, np.ndarray]]:
    """A drafter on the fixture's embedding and output layer, and what its authors' code found."""
    head, _ = load_published(dflash.KIND, HEADS / name, mx.float32)
    facts = dict(np.load(HEADS / name / "reference.npz"))
    table, output = mx.array(facts["embedding"]), mx.array(facts["lm_head"])
    vocabulary = SharedVocabulary(mx.arange(len(table)), lambda hidden: hidden @ output.T)
    kind = LinkedDrafter if name in LINKED else DFlashDrafter
    view = View((0, 1, 2), head.config.layer.hidden_size)
    return kind(head, vocabulary, lambda tokens: table[tokens], view, {}), facts


class Text:
    """A text that grows as in a fixture: its Contexts, round by round."""

    def __init__(self, facts: dict[str, np.ndarray]):
        self.facts, self.trail, self.start = facts, Trail(), 0
        self.transcript = Transcript([])

    def round(self, number: int) -> Context:
        states, pending = self.facts[f"context_{number}"], self.facts[f"block_{number}"][:1]
        self.trail.add(mx.array(states))
        self.start += len(states)
        more = self.start + 1 - len(self.transcript.tokens)
        self.transcript.extend([0] * (more - 1), int(pending[0]))
        return Context(
            mx.array(pending), mx.array(states[-1:]), self.start, self.transcript, None, None,
            self.trail,
        )  # fmt: skip

    @classmethod
    def whole(cls, facts: dict[str, np.ndarray]) -> Context:
        """The second round of a fresh start."""
        joined = np.concatenate([facts["context_1"], facts["context_2"]])
        return cls(facts | {"context_2": joined}).round(2)


def rounds(facts):
    text = Text(facts)
    yield 1, text.round(1)
    yield 2, text.round(2)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_are_the_authors(name):
    """Also in the second round, whose context is that of the first and three more places."""
    drafter, facts = fixture(name)
    for number, context in rounds(facts):
        begun, memory = drafter.begin(context)
        assert begun.tolist() == [[context.position]]
        hidden = drafter.block(context.pending, memory)[0]
        np.testing.assert_allclose(hidden, facts[f"hidden_{number}"], atol=1e-4)
        theirs = facts["base_" + str(number) if name == "dspark" else f"logits_{number}"]
        np.testing.assert_allclose(drafter.project(hidden, {}), theirs, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_round_is_that_of_a_fresh_start(name):
    drafter, facts = fixture(name)
    *_, (_, context) = ((number, drafter.begin(context)) for number, context in rounds(facts))
    fresh = drafter.begin(Text.whole(facts))
    for ours, again in zip(context[1], fresh[1], strict=True):
        np.testing.assert_allclose(ours, again, atol=1e-6)


def chain(drafter: DFlashDrafter, context: Context, depths: int) -> tuple[list[int], list]:
    """The likeliest token of each place after those before it, and the scores of each place."""
    begun, memory = drafter.begin(context)
    steps, state, token, tokens, scores = (
        drafter.steps(begun, memory),
        None,
        context.pending,
        [],
        [],
    )
    for _ in range(depths):
        state = steps.advance(state, token)
        scores.append(np.array(drafter.logits(steps, state, {})[0]))
        token = mx.argmax(mx.array(scores[-1]))[None]
        tokens.append(token.item())
    return tokens, scores


@pytest.mark.parametrize("name", NAMES)
def test_chains_are_the_authors(name):
    drafter, facts = fixture(name)
    for number, context in rounds(facts):
        theirs = facts[f"tokens_{number}"].tolist()
        assert drafter.depths == len(theirs) == 6 - (name != "dspark")
        found, scores = chain(drafter, context, len(theirs))
        assert found == theirs
        tree = drafter.propose(context, FixedBudget(width=1, length=9, nodes=9))
        assert tree.tokens.tolist() == [int(context.pending[0]), *theirs]
        if name == "dspark":
            np.testing.assert_allclose(scores, facts[f"logits_{number}"], atol=1e-4)
        shorter = drafter.propose(context, FixedBudget(width=1, length=4, nodes=9))
        assert shorter.tokens.tolist() == tree.tokens[:4].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_waits_for_the_device_once(name, monkeypatch):
    """The pending token, too, is read with the draft."""
    drafter, facts = fixture(name)
    waits, finish = [], device.finish
    monkeypatch.setattr(device, "finish", lambda *arrays: waits.append(finish(*arrays)))
    for _, context in rounds(facts):
        waits.clear()
        drafter.propose(context, FixedBudget(width=3, length=5, nodes=16))
        assert len(waits) == 1


def test_dflash_2_scores_pairs_as_its_authors_do():
    """All pairs of candidates of neighbouring places, and nothing else."""
    drafter, facts = fixture("dflash2")
    for number, context in rounds(facts):
        begun, memory = drafter.begin(context)
        candidates, scores = facts[f"candidates_{number}"], facts[f"scores_{number}"]
        for place in range(1, len(candidates)):
            steps, state = drafter.steps(begun, memory), None
            before = [context.pending] + [mx.array([0])] * (place - 1)
            for token in before:
                state = steps.advance(state, token)
            state = steps.advance(state[mx.zeros(4, mx.int32)], mx.array(candidates[place - 1]))
            found = np.array(drafter.logits(steps, state, {}))
            ours = np.take_along_axis(found, candidates[None, place].repeat(4, 0), axis=1)
            np.testing.assert_allclose(ours, scores[place], atol=1e-4)
            assert np.isfinite(found).sum() == ours.size


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_made_of_the_scores_of_its_chains(name):
    """Each node's log-probability is the sum of those along its path, of soft-maxes of scores."""
    drafter, facts = fixture(name)
    context = Text(facts).round(1)
    tree = drafter.propose(context, FixedBudget(width=3, length=4, nodes=20))
    assert len(tree) == 20
    assert tree.depths.max() == 3
    begun, memory = drafter.begin(context)
    for row in range(1, len(tree)):
        steps, state, expected = drafter.steps(begun, memory), None, 0.0
        path = tree.tokens[tree.path(row)].tolist()
        for token, after in pairwise(path):
            state = steps.advance(state, mx.array([token]))
            scores = drafter.logits(steps, state, {})[0]
            expected += (scores[after] - mx.logsumexp(scores)).item()
        assert tree.logprobs[row] == pytest.approx(expected, abs=1e-4)


def test_no_more_candidates_are_drafted_than_the_selector_scores():
    drafter, facts = fixture("dflash2")
    tree = drafter.propose(Text(facts).round(1), FixedBudget(width=8, length=6, nodes=10_000))
    assert np.isfinite(tree.logprobs).all()
    for row, children in enumerate(tree.children):
        assert len(children) <= 4, row
        allowed = facts["candidates_1"][tree.depths[row]].tolist() if children else []
        assert set(children) <= set(allowed)


@pytest.mark.parametrize(
    ("sight", "sees"),
    [
        (Sight(), lambda q, k, text: True),
        (Sight(causal=True), lambda q, k, text: text or k <= q),
        (Sight(window=3), lambda q, k, text: q - k < 3),
        (Sight(3, True), lambda q, k, text: q - k < 3 and (text or k <= q)),
    ],
)
def test_rows_see_what_they_were_trained_to_see(sight, sees):
    places, size, visible = 8, 4, [5, 7]
    mask = np.array(seen(mx.array(visible), size, places)(sight))
    for row in range(8):
        block, query = row // size, visible[row // size] + row % size
        for column in range(places + 8):
            if column < places:
                expected = column < visible[block] and sees(query, column, True)
            else:
                other = column - places
                key = visible[block] + other % size
                expected = other // size == block and sees(query, key, False)
            assert mask[row, column] == expected, (row, column)


def random_head(seed: int = 0, **more) -> BlockHead:
    """A head with random weights that change what a block says, of the sizes of a tiny target."""
    layer = qwen3.ModelArgs(
        model_type="qwen3", hidden_size=64, num_hidden_layers=1, intermediate_size=48,
        num_attention_heads=4, rms_norm_eps=1e-6, vocab_size=1, num_key_value_heads=2,
        max_position_embeddings=512, rope_theta=10000.0, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    settings = {
        "sights": (Sight(8, True), Sight()),
        "reads": (0, 1),
        "vocab_size": 97,
        "draft_vocab_size": 97,
        "block_size": 5,
        "mask_token_id": 3,
    }
    config = BlockConfig(layer=layer, **settings | more)
    head, rng = BlockHead(config), np.random.default_rng(seed)
    weights = [
        (name, mx.array(rng.normal(size=x.shape).astype(np.float32)) / math.sqrt(x.shape[-1]))
        for name, x in tree_flatten(head.parameters())
    ]
    head.load_weights(weights)
    return head


VARIANTS = {
    "dflash": {},
    "dflash2": {"conv_taps": 2, "conv_group": 16, "candidates": 5, "rank": 8},
    **{kind: {"markov": kind, "rank": 8, "next_token": True} for kind in MarkovHead.KINDS},
}


def drafter_for(model, variant: str) -> DFlashDrafter:
    head = random_head(**VARIANTS[variant])
    return dflash._drafter(adapt(model), head, np.arange(97), {})


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_a_markov_head_links_as_its_formula_says(kind):
    head = random_head(1, **VARIANTS[kind]).link
    weights = {name: np.array(x) for name, x in tree_flatten(head.parameters())}
    rng = np.random.default_rng(2)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    base, memory, ours = rng.normal(size=(3, 97)).astype(np.float32), np.zeros((3, 8)), None
    for _ in range(3):
        tokens, hidden = rng.integers(0, 97, 3), rng.normal(size=(3, 64)).astype(np.float32)
        e = weights["markov_w1.weight"][tokens]
        if kind == "gated":
            z = np.concatenate([hidden, e], axis=1)
            read = e * sigmoid(z @ weights["gate_proj.weight"].T + weights["gate_proj.bias"])
        else:
            z = np.concatenate([memory, e, hidden], axis=1)
            z = z @ weights["joint_proj.weight"].T + weights["joint_proj.bias"]
            gate, new, out = sigmoid(z[:, :8]), np.tanh(z[:, 8:16]), z[:, 16:]
            memory, read = gate * memory + (1 - gate) * new, np.tanh(out)
        found, ours = head.read(mx.array(hidden), mx.array(tokens), ours)
        scores = head.scores(mx.array(base), mx.arange(3), found)
        expected = base + read @ weights["markov_w2.weight"].T
        np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_context_is_that_of_a_fresh_start_whatever_was_taken_at_a_time(seed):
    """And it is computed row by row: nothing depends on how the text came in."""
    head, view, rng = random_head(seed), View((1, 2), 64), np.random.default_rng(seed)
    states = mx.array(rng.normal(size=(60, 192)).astype(np.float32))
    text, trail, transcript, done = BlockText(head, view), Trail(), Transcript([0]), 0
    while done < 60:
        more = int(rng.integers(0, 9))
        trail.add(states[done : done + more])
        done = min(60, done + more)
        if rng.random() < 0.6 or done == 60:
            ours = text.of(transcript, trail)
    fresh = BlockText(head, view).of_whole(states, 60)
    assert ours[-1].tolist() == fresh[-1].tolist() == [60]
    for a, b in zip(ours, fresh, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(np.array(ours[0])[:, :, :60]).min() > 0
    again = text.of(Transcript([0]), Trail())
    assert again[-1].tolist() == [0]


class Watched(ScriptedDrafter):
    """Proposes as scripted, and keeps what another drafter would begin from each round."""

    def __init__(self, other: DFlashDrafter, *script, **more):
        super().__init__(*script, **more)
        self.other, self.begun = other, []

    def propose(self, context, budget):
        self.begun.append((context.position, self.other.begin(context)[1]))
        return super().propose(context, budget)


def test_the_context_is_that_of_a_fresh_start_where_trees_were_accepted_in_part():
    model, prompt = build("llama"), tiny_prompt()
    drafter = drafter_for(model, "dflash")
    answer, captured = written(model, prompt, 40)
    text = [*prompt, *answer.tokens.tolist()]
    watched = Watched(drafter, text, right=3, wrong=2, decoys=True)
    assert ids(generation(model, prompt, watched)) == answer.tokens.tolist()
    assert len(watched.begun) < 15
    for position, (*arrays, visible) in watched.begun:
        fresh = BlockText(drafter.head, drafter.view).of_whole(captured[:position], position)
        assert visible.tolist() == [position]
        for ours, theirs in zip(arrays, fresh, strict=False):
            np.testing.assert_allclose(ours[:, :, :position], theirs[:, :, :position], atol=1e-4)


def test_a_text_may_be_longer_than_the_first_buffers():
    head, view, rng = random_head(sights=(Sight(8), Sight())), View((0, 1), 64), np.random
    states = mx.array(rng.default_rng(0).normal(size=(2 * CHUNK + 70, 128)).astype(np.float32))
    trail, text, transcript = Trail(), BlockText(head, view), Transcript([0])
    embedded = mx.array(rng.default_rng(1).normal(size=(1, 5, 64)).astype(np.float32))
    for piece in (states[:300], states[300:]):
        trail.add(piece)
        memory = text.of(transcript, trail)
    assert memory[0].shape[2] == 4 * CHUNK
    short = BlockText(head, view)
    short.restart()
    for row in range(0, len(states), 97):
        short._head.take_in(states[row : row + 97], short._layers)
    exact = [x[:, :, : len(states)] for x in memory[:-1]]
    for ours, theirs in zip(exact, (x for y in short._layers for x in (y.keys, y.values)),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(ours, theirs[:, :, : len(states)], atol=1e-5)
    np.testing.assert_allclose(
        head(embedded, memory), head(embedded, [*exact, memory[-1]]), atol=1e-5
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [{}, {"temp": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_text_is_that_of_plain_decoding(variant, sampling):
    model, prompt = build("llama"), tiny_prompt()
    plain = ids(generation(model, prompt, **sampling))
    drafter = drafter_for(model, variant)
    drafted = ids(generation(model, prompt, drafter, **sampling))
    assert drafted == plain
    assert ids(generation(model, tiny_prompt(5, 1), drafter)) == ids(
        generation(model, tiny_prompt(5, 1))
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_can_be_drawn(variant):
    model, prompt = build("llama"), tiny_prompt()
    run = generation(model, prompt, drafter_for(model, variant), temp=0.8, seed=3, rule="rejection")
    assert len(ids(run)) == 40


@pytest.mark.parametrize("variant", ["dflash", "vanilla"])
def test_a_reduced_vocabulary_grows_with_the_text_where_nothing_links_neighbours(variant):
    model, prompt, few = build("llama"), tiny_prompt(), np.arange(0, 97, 9)
    head = random_head(draft_vocab_size=len(few), **VARIANTS[variant])
    drafter = dflash._drafter(adapt(model), head, few, {})
    known = set(drafter.vocabulary.of(Transcript(prompt))[0].tolist())
    assert known >= set(few.tolist())
    assert (known >= set(prompt)) == (variant == "dflash")
    assert ids(generation(model, prompt, drafter)) == ids(generation(model, prompt))


def written(model, prompt: list[int], tokens: int) -> tuple[replay.Answer, mx.array]:
    """What plain decoding writes, as a shard holds it, and what is captured of all (T, C)."""
    target, trail = adapt(model), Trail()
    answer = ids(generation(model, prompt, max_tokens=tokens))
    text = [*prompt, *answer]
    target.read(text[:-1], target.empty_caches(), 512, trail=trail)
    captured = trail.since(0, None)
    first = len(prompt)
    return (
        replay.Answer(
            np.array(prompt), np.array(answer), captured[first - 1 :], captured[: first - 1]
        ),
        captured,
    )


def test_scale_multiplier_and_cap_are_honoured():
    model = build("llama")
    plain, other = drafter_for(model, "dflash"), random_head(
        embedding_scale=3.0, multiplier=0.5, cap=2.0
    )  # fmt: skip
    other = dflash._drafter(adapt(model), other, np.arange(97), {})
    memory = [*BlockText(plain.head, plain.view).of_whole(mx.ones((4, 192)), 4)]
    pending = mx.array([5])
    assert not mx.allclose(plain.block(pending, memory), other.block(pending, memory))
    hidden = 9 * plain.block(pending, memory)[0]
    logits = plain.project(hidden, {})
    expected = 2 * np.tanh(np.array(logits) / 4)
    np.testing.assert_allclose(other.project(hidden, {}), expected, atol=1e-5)
