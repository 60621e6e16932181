"""The token tree: what a drafter proposes and the target verifies in one pass.

Shape letters: N nodes, W beam width, L beam length (the root included), M scored candidates.
Pure numpy: no model, no device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

PENDING = -1
"""Token id of a root whose value only the device knows yet: the target's pending token."""
FILLING = 0, 1
"""Token ids, which every vocabulary has, of nodes that only take up rows."""


def likeliest(scores, budget: int) -> np.ndarray:
    """Indices, ascending, of the candidates that a tree of `budget` nodes holds beside its root."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[: max(budget - 1, 0)])


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Candidate continuations that share their prefixes, rooted at the pending token.

    tokens    (N,) int32    token ids; tokens[0] is the pending token or `PENDING`
    parents   (N,) int32    parents[i] < i; parents[0] = -1; siblings carry distinct tokens
    logprobs  (N,) float32  the drafter's cumulative log-probability of the path to each node

    Rows are in depth-first order, the likeliest child first, so that the likeliest path is
    rows 0, 1, 2, ... and committing it moves nothing in the KV cache.

    Example: root 7 with children 3 (likelier) and 5, where 3 has the child 9:
    tokens [7, 3, 9, 5], parents [-1, 0, 1, 0], depths [0, 1, 2, 1].
    """

    tokens: np.ndarray
    parents: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def root(cls, token: int = PENDING) -> TokenTree:
        """The empty draft: nothing but the pending token."""
        return cls(np.array([token], np.int32), np.array([-1], np.int32), np.zeros(1, np.float32))

    @classmethod
    def best(cls, root: int, tokens, parents, logprobs, budget: int, scores=None) -> TokenTree:
        """The likeliest nodes of all that were scored on the way (EAGLE-2, arXiv 2406.16858 §4).

        root             token id of the pending token
        tokens    (M,)   candidate ids
        parents   (M,)   index of the parent among the candidates, -1 for children of the root
        logprobs  (M,)   cumulative log-probabilities; a child's is never above its parent's
        budget           most nodes of the tree, the root included
        scores    (M,)   what nodes are chosen by instead, such as corrected probabilities; the
                         same rule holds

        Ancestors of a kept node are always kept: scores only fall with depth, and a parent comes
        before its children among the candidates.
        """
        parents = np.asarray(parents, dtype=int)  # also of an empty list
        kept = likeliest(logprobs if scores is None else scores, budget)
        new_index = np.full(len(parents) + 1, -1)
        new_index[kept] = np.arange(1, len(kept) + 1)
        new_index[-1] = 0  # index -1 is the root
        return cls._depth_first(
            np.concatenate([[root], np.asarray(tokens)[kept]]),
            np.concatenate([[-1], new_index[parents[kept]]]),
            np.concatenate([[0.0], np.asarray(logprobs)[kept]]),
        )

    @classmethod
    def from_beams(cls, beams, logprobs=None) -> TokenTree:
        """The prefix tree of some beams: the paper's dynamic tree attention (arXiv 2403.09919).

        beams     (W, L)  token ids; every beam starts with the same pending token; shorter ones
                          are padded with -1
        logprobs  (W, L)  cumulative log-probability of each prefix; without it a node scores by
                          the rank of the best beam through it
        """
        beams = np.asarray(beams)
        if logprobs is None:
            logprobs = np.broadcast_to(-np.arange(len(beams), dtype=float)[:, None], beams.shape)
        union = Trie(int(beams[0, 0]))
        for beam, scores in zip(beams.tolist(), np.asarray(logprobs).tolist(), strict=True):
            assert beam[0] == union.tokens[0], "beams must start with the same pending token"
            node = 0
            for token, score in zip(beam[1:], scores[1:], strict=True):
                if token < 0:
                    break
                node = union.add(node, token, score)
        return cls._depth_first(union.tokens, union.parents, union.logprobs)

    def merge(self, other: TokenTree) -> TokenTree:
        """The union of two trees with the same root; a node in both keeps the higher score."""
        union = Trie(int(self.tokens[0]))
        for tree in (self, other):
            place = [0]  # where each of the tree's rows lies in the union
            for row in range(1, len(tree)):
                parent, token = place[tree.parents[row]], int(tree.tokens[row])
                place.append(union.add(parent, token, float(tree.logprobs[row])))
        return self._depth_first(union.tokens, union.parents, union.logprobs)

    def filled(self, rows: int) -> TokenTree:
        """With nodes added that no one proposed, near the root, until there are `rows`."""
        if len(self) >= rows:
            return self
        tokens, parents = self.tokens.tolist(), self.parents.tolist()
        taken = set(zip(parents, tokens, strict=True))
        places = ((parent, token) for parent in count() for token in FILLING)
        free = (place for place in places if place not in taken)
        for parent, token in islice(free, rows - len(self)):
            parents.append(parent)
            tokens.append(token)
        unlikely = [-np.inf] * (rows - len(self))
        return self._depth_first(tokens, parents, [*self.logprobs.tolist(), *unlikely])

    def without_filling(self, path: Sequence[int]) -> tuple[TokenTree, list[int]]:
        """What was proposed, or is on the path; and the rows of the path in it."""
        kept = np.isfinite(self.logprobs)
        kept[list(path)] = True
        place = np.cumsum(kept) - 1
        parents = np.where(self.parents < 0, -1, place[self.parents]).astype(np.int32)
        tree = TokenTree(self.tokens[kept], parents[kept], self.logprobs[kept])
        return tree, place[list(path)].tolist()

    @classmethod
    def _depth_first(cls, tokens, parents, logprobs) -> TokenTree:
        """Put nodes, whose parents come first, into the order of rows."""
        children: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        order: list[int] = []
        stack = [0]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(sorted(children[node], key=lambda child: logprobs[child]))
        row = np.empty(len(order), np.int32)
        row[order] = np.arange(len(order))
        parents = np.asarray(parents)[order]
        return cls(
            np.asarray(tokens)[order].astype(np.int32),
            np.where(parents < 0, -1, row[parents]).astype(np.int32),
            np.asarray(logprobs)[order].astype(np.float32),
        )

    @cached_property
    def depths(self) -> np.ndarray:
        """(N,) int32: distance from the root."""
        depths = np.zeros(len(self), np.int32)
        for i in range(1, len(self)):
            depths[i] = depths[self.parents[i]] + 1
        return depths

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """For each node: token id -> row of the child that carries it."""
        children: list[dict[int, int]] = [{} for _ in range(len(self))]
        for row in range(1, len(self)):
            children[self.parents[row]][int(self.tokens[row])] = row
        return children

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node has at most one child: rows then are plain consecutive positions."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    def path(self, node: int) -> list[int]:
        """Rows from the root to `node`, both included."""
        rows = []
        while node >= 0:
            rows.append(int(node))
            node = self.parents[node]
        return rows[::-1]

    def paths(self) -> Iterator[list[int]]:
        """The path to every leaf."""
        for row, children in enumerate(self.children):
            if not children:
                yield self.path(row)


@dataclass(frozen=True, eq=False)
class DrawnTree(TokenTree):
    """A tree whose siblings were drawn one after the other without replacement, in row order.

    ids      (D,)    token ids that could be drawn
    probs    (Q, D)  what was drawn from
    sources  (N,)    of each node: the row of `probs` that its children were drawn from, or -1

    The shape of the tree must not depend on which tokens were drawn.
    """

    ids: np.ndarray
    probs: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True, eq=False)
class Candidates:
    """Everything a search scored under one root.

    root              token id of the pending token
    tokens    (M,)    token ids
    parents   (M,)    index of the parent among the candidates, -1 for children of the root
    logprobs  (M,)    cumulative log-probabilities
    beams     (W,)    the last node of each finished beam, the likeliest first
    always    (M,)    bool: what any search would have scored, however narrow and short
    """

    root: int
    tokens: np.ndarray
    parents: np.ndarray
    logprobs: np.ndarray
    beams: np.ndarray
    always: np.ndarray = None  # type: ignore[assignment]  # none, until below

    def __post_init__(self) -> None:
        if self.always is None:
            object.__setattr__(self, "always", np.zeros(len(self.tokens), bool))

    @cached_property
    def depths(self) -> np.ndarray:
        """(M,) int: distance from the root, 1 for its children."""
        depths, nodes = np.ones(len(self.tokens), int), self.parents
        while (nodes >= 0).any():
            depths += nodes >= 0
            nodes = np.where(nodes >= 0, self.parents[nodes], -1)
        return depths

    @cached_property
    def levels(self) -> list[np.ndarray]:
        """Indices of the candidates of each depth, from 1 on."""
        order = np.argsort(self.depths, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.depths)[1:])[:-1]) if len(order) else []

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The candidates along a text that goes on with `tokens`, as far as there are any."""
        places = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        nodes = {place: node for node, place in enumerate(places)}
        path = [-1]
        for token in tokens:
            node = nodes.get((path[-1], int(token)))
            if node is None:
                break
            path.append(node)
        return path[1:]

    def within(self, width: int) -> np.ndarray:
        """(M,) bool: which of them a search with only `width` beams would have scored."""
        children, logprobs = defaultdict(list), self.logprobs.tolist()
        for node, parent in enumerate(self.parents.tolist()):
            children[parent].append(node)
        likelier = lambda node: -logprobs[node]
        scored, expanded = np.zeros(len(self.tokens), bool), [-1]
        while expanded:
            families = (sorted(children[node], key=likelier) for node in sorted(expanded))
            here = [node for family in families for node in family[:width]]
            scored[here] = True
            expanded = sorted(here, key=likelier)[:width]
        return scored

    @classmethod
    def united(
        cls,
        parts: Sequence[Candidates],
        score: Callable[[Trie, list[list[int]]], None] = lambda trie, places: None,
    ) -> Candidates:
        """The nodes of several searches under the same root, each once; every beam is still one.

        score  may change the scores of the trie's nodes, at first the best that any part gave;
               it also gets, for each part, where its nodes are in the trie
        """
        trie = Trie(parts[0].root)
        places: list[list[int]] = []
        beams: list[int] = []
        always: set[int] = set()
        for part in parts:
            assert part.root == trie.tokens[0], "candidates must have the same root"
            place: list[int] = []
            nodes = zip(
                part.tokens.tolist(), part.parents.tolist(), part.logprobs.tolist(), strict=True
            )
            for token, parent, logprob in nodes:
                place.append(trie.add(0 if parent < 0 else place[parent], token, logprob))
            places.append(place)
            beams += [place[beam] for beam in part.beams]
            always.update(place[node] for node in np.flatnonzero(part.always))
        score(trie, places)
        return trie.candidates(beams, always)

    @classmethod
    def of(cls, tree: TokenTree) -> Candidates:
        """The nodes of a tree; its leaves are the beams."""
        trie = Trie(int(tree.tokens[0]))
        trie.tokens, trie.parents = tree.tokens.tolist(), tree.parents.tolist()
        trie.logprobs = tree.logprobs.tolist()
        return trie.candidates()

    def beam_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(W, L) token ids of the beams, the root first, and (W, L) their cumulative logprobs.

        Beams shorter than the longest are padded with -1. Without beams: the root alone.
        """
        rows: list[list[int]] = [[], *([] for _ in self.beams[1:])]
        for row, node in zip(rows, self.beams, strict=False):
            while node >= 0:
                row.append(node)
                node = self.parents[node]
        length = 1 + max(map(len, rows))
        tokens, logprobs = np.full((len(rows), length), -1), np.zeros((len(rows), length))
        tokens[:, 0] = self.root
        for i, row in enumerate(rows):
            tokens[i, 1 : len(row) + 1] = self.tokens[row[::-1]]
            logprobs[i, 1 : len(row) + 1] = self.logprobs[row[::-1]]
        return tokens, logprobs


class Trie:
    """Nodes under one root, each (parent, token) once, with the highest score it was given.

    tokens, parents, logprobs  of the nodes, node 0 being the root; a parent comes before its
                               children
    """

    def __init__(self, root: int):
        self.tokens, self.parents, self.logprobs = [root], [-1], [0.0]
        self._index: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int, logprob: float) -> int:
        """The node of `token` after the node `parent`."""
        node = self._index.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.logprobs.append(logprob)
        self.logprobs[node] = max(self.logprobs[node], logprob)
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` after the node `parent`, if there is one."""
        return self._index.get((parent, token))

    def candidates(
        self, beams: Iterable[int] | None = None, always: Collection[int] = ()
    ) -> Candidates:
        """All nodes; `beams` are the last nodes of finished beams, by default all leaves."""
        if beams is None:
            beams = set(range(1, len(self.tokens))) - set(self.parents)
        beams = sorted(dict.fromkeys(beams), key=lambda node: -self.logprobs[node])
        return Candidates(
            root=self.tokens[0],
            tokens=np.array(self.tokens[1:], int),
            parents=np.array(self.parents[1:], int) - 1,
            logprobs=np.array(self.logprobs[1:], float),
            beams=np.array(beams, int) - 1,
            always=np.isin(np.arange(1, len(self.tokens)), list(always)),
        )
