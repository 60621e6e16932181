"""Token trees: the reference's packing, brute force on random trees, and the order of rows."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from redrafter_mlx.drafters.beam_search import collect
from redrafter_mlx.rounds.tree import PENDING, Candidates, TokenTree
from redrafter_mlx.target.lineage import Lineage

GOLDEN = Path(__file__).parent / "fixtures" / "golden" / "tree_packing.safetensors"
ROOT = 7


def path_tokens(tree: TokenTree, row: int) -> tuple[int, ...]:
    return tuple(tree.tokens[tree.path(row)].tolist())


def scored_paths(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """Token path from the root to each node -> its score."""
    return {path_tokens(tree, row): float(tree.logprobs[row]) for row in range(len(tree))}


def random_candidates(rng: np.random.Generator, nodes: int, levels: int | None = None):
    """Tokens, parents and scores of a random tree without its root; few `levels` make many ties."""
    tokens, parents, scores = [], [], []
    for node in range(nodes):
        parent = int(rng.integers(-1, node)) if node else -1
        taken = {tokens[i] for i in range(node) if parents[i] == parent}
        tokens.append(int(rng.choice([t for t in range(nodes + 1) if t not in taken])))
        parents.append(parent)
        above = scores[parent] if parent >= 0 else 0.0
        scores.append(above - (rng.random() if levels is None else int(rng.integers(levels))))
    return tokens, parents, scores


def random_tree(rng: np.random.Generator, nodes: int, levels: int | None = None) -> TokenTree:
    return TokenTree.best(ROOT, *random_candidates(rng, nodes, levels), budget=nodes + 1)


def assert_rows_in_order(tree: TokenTree) -> None:
    """Parents first, each subtree in consecutive rows, the likeliest child first."""
    assert tree.parents[0] == -1
    assert (tree.parents[1:] < np.arange(1, len(tree))).all()
    assert (tree.parents[1:] >= 0).all()

    def rows_below(row: int) -> list[int]:
        children = [i for i in range(len(tree)) if tree.parents[i] == row]
        falling = sorted(children, key=lambda child: -tree.logprobs[child])
        assert [tree.logprobs[c] for c in children] == [tree.logprobs[c] for c in falling]
        assert len({int(tree.tokens[c]) for c in children}) == len(children)
        return [row, *itertools.chain.from_iterable(map(rows_below, children))]

    assert rows_below(0) == list(range(len(tree)))


@pytest.fixture(scope="module")
def golden():
    return {name: np.array(value[0]) for name, value in mx.load(str(GOLDEN)).items()}


# ---------------------------------------------------------------------------------------------
# Against the reference implementation


@pytest.mark.parametrize("case", range(5))
def test_beams_pack_into_the_nodes_of_the_reference(golden, case):
    tree = TokenTree.from_beams(golden[f"{case}.beams"])
    expected = golden[f"{case}.packed_tokens"]
    assert len(tree) == len(expected)
    assert sorted(tree.tokens.tolist()) == sorted(expected.tolist())
    prefixes = {
        tuple(beam[: length + 1].tolist())
        for beam in golden[f"{case}.beams"]
        for length in range(len(beam))
    }
    assert set(scored_paths(tree)) == prefixes
    assert_rows_in_order(tree)


@pytest.mark.parametrize("case", range(5))
def test_mask_and_depths_equal_the_reference_path_by_path(golden, case):
    tree = TokenTree.from_beams(golden[f"{case}.beams"])
    packed, depths = golden[f"{case}.packed_tokens"], golden[f"{case}.depths"]
    row_of = {path_tokens(tree, row): row for row in range(len(tree))}
    compared = set()
    for beam, places in zip(golden[f"{case}.beams"], golden[f"{case}.unpacker"], strict=True):
        for length, place in enumerate(places):
            row = row_of[tuple(beam[: length + 1].tolist())]
            assert tree.tokens[row] == packed[place]
            assert tree.depths[row] == depths[place]
            attended = np.flatnonzero(golden[f"{case}.tree_mask"][place])
            from_root = attended[np.argsort(depths[attended])]
            seen = np.flatnonzero(
                Lineage(tree.parents).mask[row]
            )  # parents come first: already from the root
            assert tree.tokens[seen].tolist() == packed[from_root].tolist()
            compared.add(row)
    assert compared == set(range(len(tree)))


def test_every_beam_is_a_path_of_its_tree():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, length = rng.integers(1, 9), rng.integers(2, 7)
        beams = rng.integers(0, 3, (width, length))
        beams[:, 0] = ROOT
        tree = TokenTree.from_beams(beams)
        leaves = {tuple(tree.tokens[rows].tolist()) for rows in tree.paths()}
        assert leaves == {tuple(beam) for beam in beams.tolist()}


def test_a_node_of_several_beams_scores_as_its_best_beam():
    tree = TokenTree.from_beams([[7, 3, 9], [7, 5, 2], [7, 3, 4]])
    assert tree.tokens.tolist() == [7, 3, 9, 4, 5, 2]
    assert tree.parents.tolist() == [-1, 0, 1, 1, 0, 4]
    assert tree.depths.tolist() == [0, 1, 2, 2, 1, 2]
    assert tree.logprobs.tolist() == [0, 0, 0, -2, -1, -1]


def test_beams_keep_the_scores_they_come_with():
    logprobs = [[0, -2.0, -2.5], [0, -1.0, -4.0], [0, -2.0, -2.25]]
    tree = TokenTree.from_beams([[7, 3, 9], [7, 5, 2], [7, 3, 4]], logprobs)
    assert tree.tokens.tolist() == [7, 5, 2, 3, 4, 9]
    assert tree.logprobs.tolist() == [0, -1, -4, -2, -2.25, -2.5]


# ---------------------------------------------------------------------------------------------
# Mask, depths, paths


@pytest.mark.parametrize("nodes", [1, 2, 5, 20, 60])
def test_mask_and_depths_equal_a_walk_to_the_root(nodes):
    rng = np.random.default_rng(nodes)
    for _ in range(10):
        tree = random_tree(rng, nodes)
        mask = np.zeros((len(tree), len(tree)), bool)
        for row in range(len(tree)):
            node, steps = row, -1
            while node >= 0:
                mask[row, node] = True
                node, steps = tree.parents[node], steps + 1
            assert tree.depths[row] == steps
            assert tree.path(row) == np.flatnonzero(mask[row]).tolist()
        np.testing.assert_array_equal(Lineage(tree.parents).mask, mask)


def test_paths_end_in_every_leaf_once():
    tree = random_tree(np.random.default_rng(1), 30)
    leaves = set(range(len(tree))) - set(tree.parents.tolist())
    paths = list(tree.paths())
    assert {rows[-1] for rows in paths} == leaves
    assert len(paths) == len(leaves)
    assert all(rows == tree.path(rows[-1]) for rows in paths)


def test_children_are_found_by_their_token():
    tree = random_tree(np.random.default_rng(2), 30)
    found = {
        (parent, token): row
        for parent, children in enumerate(tree.children)
        for token, row in children.items()
    }
    assert found == {
        (int(tree.parents[row]), int(tree.tokens[row])): row for row in range(1, len(tree))
    }


def test_the_root_alone_is_a_tree():
    for tree in (TokenTree.root(5), TokenTree.from_beams([[5], [5]])):
        assert (tree.tokens.tolist(), tree.parents.tolist()) == ([5], [-1])
        assert Lineage(tree.parents).mask.tolist() == [[True]]
        assert list(tree.paths()) == [[0]]
        assert tree.is_chain
    assert TokenTree.root().tokens.tolist() == [PENDING]


def test_no_candidates_leave_the_root():
    tree = TokenTree.best(5, [], [], [], budget=16)
    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([5], [-1])


def test_is_chain_is_true_of_trees_without_a_fork_only():
    chain = TokenTree.best(7, [1, 2, 3], [-1, 0, 1], [-1, -2, -3], 9)
    late_fork = TokenTree.best(7, [1, 2, 3], [-1, 0, 0], [-1, -2, -3], 9)
    early_fork = TokenTree.best(7, [1, 2, 3], [-1, -1, 1], [-1, -2, -3], 9)
    assert chain.is_chain
    assert not late_fork.is_chain
    assert not early_fork.is_chain
    rng = np.random.default_rng(3)
    for tree in (random_tree(rng, 4) for _ in range(100)):
        assert tree.is_chain == (len(list(tree.paths())) == 1)


# ---------------------------------------------------------------------------------------------
# The likeliest nodes


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("budget", [1, 2, 4, 7, 9])
def test_best_has_the_highest_sum_of_all_subtrees_of_its_size(budget, levels):
    """With two levels of scores, children often tie with their parents."""
    rng = np.random.default_rng(budget)
    for _ in range(20):
        tokens, parents, scores = random_candidates(rng, 8, levels)
        tree = TokenTree.best(ROOT, tokens, parents, scores, budget)
        sums = [
            sum(scores[node] for node in kept)
            for kept in itertools.combinations(range(8), budget - 1)
            if all(parents[node] in (-1, *kept) for node in kept)
        ]
        assert len(tree) == budget
        assert float(tree.logprobs.sum()) == pytest.approx(max(sums, default=0.0), abs=1e-5)
        assert_rows_in_order(tree)


@pytest.mark.parametrize("levels", [None, 1, 2])
def test_best_keeps_paths_and_scores_of_its_candidates(levels):
    rng = np.random.default_rng(0)
    for budget in range(1, 42):
        candidates = random_candidates(rng, 40, levels)
        everything = scored_paths(TokenTree.best(ROOT, *candidates, budget=41))
        tree = TokenTree.best(ROOT, *candidates, budget=budget)
        assert len(tree) == budget
        assert scored_paths(tree).items() <= everything.items()
        kept = sorted(tree.logprobs.tolist())
        assert kept == sorted(everything.values())[-budget:]
        assert_rows_in_order(tree)


@pytest.mark.parametrize("budget", [-1, 0, 1])
def test_a_budget_below_two_leaves_the_root(budget):
    tree = TokenTree.best(ROOT, [1, 2], [-1, 0], [-1, -2], budget)
    assert tree.tokens.tolist() == [ROOT]


@pytest.mark.parametrize("budget", [6, 7, 10**9])
def test_a_budget_above_the_candidates_keeps_them_all(budget):
    tokens, parents, scores = random_candidates(np.random.default_rng(4), 5)
    assert len(TokenTree.best(ROOT, tokens, parents, scores, budget)) == 6


def test_the_likeliest_path_lies_in_the_first_rows():
    rng = np.random.default_rng(5)
    for _ in range(50):
        tree = random_tree(rng, 25)
        path = [0]
        while children := tree.children[path[-1]]:
            path.append(max(children.values(), key=lambda row: tree.logprobs[row]))
        assert path == list(range(len(path)))


def test_rows_follow_the_example_of_the_documentation():
    tree = TokenTree.best(7, [5, 3, 9], [-1, -1, 1], [-2.0, -0.5, -1.0], budget=4)
    assert tree.tokens.tolist() == [7, 3, 9, 5]
    assert tree.parents.tolist() == [-1, 0, 1, 0]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert tree.logprobs.tolist() == [0.0, -0.5, -1.0, -2.0]
    assert (tree.tokens.dtype, tree.parents.dtype) == (np.int32, np.int32)
    assert (tree.logprobs.dtype, tree.depths.dtype) == (np.float32, np.int32)


# ---------------------------------------------------------------------------------------------
# Merging


def test_merge_holds_the_paths_of_both_with_the_higher_score():
    rng = np.random.default_rng(6)
    shared = 0
    for _ in range(50):
        one, other = random_tree(rng, 8), random_tree(rng, 8)
        merged, a, b = scored_paths(one.merge(other)), scored_paths(one), scored_paths(other)
        assert merged == {
            path: max(tree[path] for tree in (a, b) if path in tree) for path in a | b
        }
        assert_rows_in_order(one.merge(other))
        shared += len(a.keys() & b.keys()) - 1
    assert shared > 20


def test_merge_gives_the_same_paths_in_either_order():
    rng = np.random.default_rng(7)
    for _ in range(50):
        one, other = random_tree(rng, 12), random_tree(rng, 6)
        assert scored_paths(one.merge(other)) == scored_paths(other.merge(one))


def test_merge_with_nothing_new_changes_nothing():
    tree = random_tree(np.random.default_rng(8), 20)
    for merged in (tree.merge(tree), tree.merge(TokenTree.root(ROOT))):
        assert scored_paths(merged) == scored_paths(tree)
        assert len(merged) == len(tree)


# ---------------------------------------------------------------------------------------------
# Finished beams of a search


def test_beam_tokens_follow_the_example():
    """Width 2, length 3: both depth-1 candidates live on; the best beams end in 4 and 6."""
    candidates = Candidates(
        root=7,
        tokens=np.array([1, 2, 3, 4, 5, 6]),
        parents=np.array([-1, -1, 0, 0, 1, 1]),
        logprobs=np.array([-1.0, -2.0, -9.0, -3.0, -8.0, -4.0]),
        beams=np.array([3, 5]),
    )
    tokens, logprobs = candidates.beam_tokens()
    assert tokens.tolist() == [[7, 1, 4], [7, 2, 6]]
    assert logprobs.tolist() == [[0, -1, -3], [0, -2, -4]]


@pytest.mark.parametrize(("width", "length"), [(1, 2), (1, 5), (3, 2), (4, 5)])
def test_beam_tokens_are_the_walks_from_each_beam_to_the_root(width, length):
    rng = np.random.default_rng(length)
    scored = width + width * width * (length - 2)
    survivors = [rng.permutation(width)]
    survivors += [rng.permutation(width * width)[:width] for _ in range(length - 2)]
    candidates = collect(
        ROOT, rng.integers(0, 50, scored), -rng.random(scored), np.stack(survivors)
    )
    tokens, logprobs = candidates.beam_tokens()
    assert tokens.shape == logprobs.shape == (width, length)
    for row, node in enumerate(candidates.beams):
        for column in range(length - 1, 0, -1):
            assert tokens[row, column] == candidates.tokens[node]
            assert logprobs[row, column] == candidates.logprobs[node]
            node = candidates.parents[node]
        assert node == -1
        assert (tokens[row, 0], logprobs[row, 0]) == (ROOT, 0)
