"""The recurrent head and its beam search, against the reference implementation and brute force."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.drafters.checkpoint import load_head

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = ["full_exit", "projected_exit", "sum_state"]


def golden(case):
    head, _, _ = load_head(GOLDEN / case, mx.float32)
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
