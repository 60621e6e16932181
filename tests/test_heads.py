"""Heads as others publish them, against what their authors' own code computes (fixtures/heads)."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from redrafter_mlx.drafters import eagle3, medusa
from redrafter_mlx.drafters.attention import AttentionDrafter, TextCache
from redrafter_mlx.drafters.beam_search import collect
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.drafters.text import OwnVocabulary
from redrafter_mlx.rounds.round import View

HEADS = Path(__file__).parent / "fixtures" / "heads"
EAGLES = sorted(path.name for path in HEADS.glob("eagle3*"))


def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(HEADS / name / "reference.npz"))


def eagle(name: str) -> tuple[AttentionDrafter, dict[str, np.ndarray]]:
    """A drafter on the fixture's own embedding; it reads three layers of a target of their size."""
    head, ids = load_published(eagle3.KIND, HEADS / name, mx.float32)
    facts = reference(name)
    table = mx.array(facts["embed_tokens"])
    view = View((0, 1, 2), head.config.target_hidden_size)
    drafter = AttentionDrafter(head, OwnVocabulary(mx.array(ids)), lambda t: table[t], view)
    return drafter, facts


@pytest.mark.parametrize("name", EAGLES)
def test_eagle3_computes_what_its_authors_code_does(name):
    drafter, facts = eagle(name)
    tokens, aux = facts["tokens"].tolist(), mx.array(facts["aux"])
    cache = TextCache(drafter.head, drafter.embed, drafter.view)
    begun, memory = cache.of_whole(tokens, aux, 1)
    np.testing.assert_allclose(drafter.head.outputs(begun), facts["logits"], atol=1e-4)
    steps = drafter.steps(begun[-1:], [*memory[:-1], memory[-1][-1:]])
    state = steps.advance(None, mx.array(tokens[-1:]))
    ids, _ = drafter.vocabulary.of(None)
    drafted = [ids[mx.argmax(steps.outputs(state), axis=-1)].item()]
    for logits in facts["chain_logits"]:
        state = steps.advance(state, mx.array(drafted[-1:]))
        np.testing.assert_allclose(steps.outputs(state)[0], logits, atol=1e-4)
        drafted.append(ids[mx.argmax(steps.outputs(state), axis=-1)].item())
    assert drafted == facts["chain_tokens"].tolist()


@pytest.mark.parametrize("round", ["", "round2_"])
def test_eagle3_draws_the_reference_tree(round):
    """Every node that topK_genrate scored, with its score, also where the text has gone on."""
    drafter, facts = eagle("eagle3")
    tokens, aux = facts["tokens"].tolist(), facts["aux"]
    if round:
        tokens = facts["round2_tokens"].tolist()
        aux = np.concatenate([aux, facts["round2_aux"]])
    begun, memory = drafter.replayed(tokens, mx.array(aux), len(tokens) - 1)
    found = drafter.search(
        3, 5, False, begun, mx.array(tokens[-1:]), None, None, None,
        *drafter.vocabulary.of(None), memory,
    )  # fmt: skip
    candidates = collect(tokens[-1], *(np.array(array[0]) for array in found))
    ours, path_of = {}, {-1: ()}
    for node, parent in enumerate(candidates.parents.tolist()):
        path_of[node] = (*path_of[parent], int(candidates.tokens[node]))
        ours[path_of[node]] = candidates.logprobs[node]
    theirs, paths = {}, {-1: ()}
    names = ("tokens", "scores", "parents")
    nodes = zip(*(facts[f"{round}tree_node_{name}"].tolist() for name in names), strict=True)
    for node, (token, score, parent) in enumerate(nodes):
        paths[node] = (*paths[parent], token)
        theirs[paths[node]] = score
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[p] for p in theirs], list(theirs.values()), atol=1e-4)


@pytest.mark.parametrize("name", ["medusa", "medusa_shared"])
def test_medusa_computes_what_its_authors_code_does(name, tmp_path):
    head, _ = load_published(medusa.KIND, HEADS / name, mx.float32)
    facts = reference(name)
    found = head(mx.array(facts["hidden"]), 3)
    if head.config.shared:
        found = found @ mx.array(facts["lm_head"]).T
    np.testing.assert_allclose(found, facts["logits"], atol=1e-4)
