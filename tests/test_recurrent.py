"""The recurrent head and its beam search, against the reference implementation and brute force."""

import itertools
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from families import build
from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.rounds.round import Transcript
from redrafter_mlx.target.adapter import adapt
from support import random_drafter

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = ["full_exit", "projected_exit", "sum_state"]


def golden(case):
    head, _ = load_head(GOLDEN / case, mx.float32)
    return head, mx.load(str(GOLDEN / case / "expected.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case):
    head, expected = golden(case)
    got, reference = np.array(head.exit(expected["head_input"])), np.array(expected["head_logits"])
    assert np.abs(got - reference).max() < 1e-5 * np.abs(reference).max()  # logits reach 85


def search(head, embeddings, context, root, width, length, cut=None):
    """Beam search with the reference's cut: only the `cut` largest logits of a row compete."""

    def score(state, depth):
        logits = head(head.read(context), state)
        if cut is not None:
            threshold = mx.sort(logits, axis=-1)[:, -cut][:, None]
            logits = mx.where(logits < threshold, -50000.0, logits - logits.max(-1, keepdims=True))
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    found = beam_search(
        advance=lambda state, tokens: head.advance(state, embeddings[tokens]),
        score=score,
        token_ids=lambda ids: ids,
        root=root,
        width=width,
        length=length,
    )
    return collect(root.item(), *(np.array(x[0]) for x in found))


def test_a_tied_output_proposes_the_ids_of_the_text_too():
    model = build("llama")
    target = adapt(model)
    drafter = random_drafter(model, d2t=np.arange(10), tied_output=True)
    drafter.vocabulary.SPARE = 16
    text = Transcript([3, 50, 60, 50])
    ids, rows = drafter.vocabulary.of(text)
    assert ids.tolist()[:12] == [*range(10), 50, 60]
    assert len(set(ids.tolist())) == ids.size == 16
    assert mx.array_equal(rows["weight"], target.output_layer(ids).weight)
    again, _ = drafter.vocabulary.of(text)
    assert again is ids
    text.extend([70], 71)  # too few to be worth a change
    assert drafter.vocabulary.of(text)[0] is ids
    text.extend(range(20, 40), 41)
    later, _ = drafter.vocabulary.of(text)
    assert {70, 71, 41, *range(20, 40)} <= set(later.tolist())
    other, _ = drafter.vocabulary.of(Transcript([3, 90]))
    assert 90 in other.tolist()
    assert 50 not in other.tolist()[:11]


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_quantised_head_are_its_own(bits):
    model = build("llama")
    fits = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
    nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    target = adapt(model)
    x, ids = mx.random.normal((3, target.hidden_size)), mx.array([5, 0, 96])
    whole = target._head(x)
    assert np.allclose(target.output_layer(ids)(x), whole[:, ids], atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_projection_in_halves_equals_the_whole(bits):
    config = HeadConfig(97, 64, 32, 1, True, 97, fused_layers=(1,))
    head = RecurrentHead(config)
    if bits:
        nn.quantize(head, group_size=32, bits=bits)
    hidden, state = mx.random.normal((2, 128)), mx.random.normal((6, 64))
    whole = mx.concatenate([mx.repeat(head.normed(hidden), 3, axis=0), state], axis=-1)
    assert np.allclose(head(head.read(hidden), state), head.exit(whole), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "length"), [(1, 4), (3, 5), (8, 5)])
@pytest.mark.parametrize("row", [0, 1])
def test_beams_equal_the_reference(case, width, length, row):
    head, expected = golden(case)
    candidates = search(
        head,
        expected["embed_tokens.weight"],
        expected["context"][row : row + 1],
        expected["init_token"][row : row + 1],
        width,
        length,
        cut=50,
    )
    tokens, logprobs = candidates.beam_tokens()
    name = f"w{width}.l{length}"
    np.testing.assert_array_equal(tokens, np.array(expected[f"beams.{name}"][row]))
    reference = np.array(expected[f"beam_logprobs.{name}"][row])
    np.testing.assert_allclose(logprobs[:, -1], reference, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_candidates_equal_brute_force(width):
    """Every candidate's score is the sum of log-probabilities along its own path."""
    rng = np.random.default_rng(width)
    tables = rng.normal(size=(4, 6, 6)).astype(np.float32)
    tables -= np.log(np.exp(tables).sum(-1, keepdims=True))
    last = lambda state: state[:, 0].astype(mx.int32)
    found = beam_search(
        advance=lambda state, tokens: tokens[:, None],
        score=lambda state, depth: mx.array(tables[depth - 1])[last(state)],
        token_ids=lambda ids: ids,
        root=mx.array([2]),
        width=width,
        length=4,
    )
    candidates = collect(2, *(np.array(x[0]) for x in found))
    beams = {(2,): 0.0}
    scored = {}
    for depth in range(3):
        joint = {
            (*beam, token): score + tables[depth, beam[-1], token]
            for (beam, score), token in itertools.product(beams.items(), range(6))
        }
        for beam in beams:
            own = sorted((b for b in joint if b[:-1] == beam), key=joint.get)[-width:]
            scored.update({b: joint[b] for b in own})
        beams = dict(sorted(joint.items(), key=lambda item: -item[1])[:width])

    def path(i):
        return (2,) if i < 0 else (*path(candidates.parents[i]), int(candidates.tokens[i]))

    got = {path(i): candidates.logprobs[i] for i in range(len(candidates.tokens))}
    assert got.keys() == scored.keys()
    assert max(abs(got[p] - scored[p]) for p in got) < 1e-5
    assert [tuple(b) for b in candidates.beam_tokens()[0]] == list(beams)
