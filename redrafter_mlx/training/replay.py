"""How well a head drafts, by replaying texts that the target has written.

A greedy text is what verification would accept, token for token. So drafting at each of its
positions once tells for every budget how many tokens each round would have yielded, without
running the target.

Shape letters: P positions, W beam width, L beam length (the root included), M candidates, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam_search import collect
from redrafter_mlx.drafters.beams import BeamDrafter
from redrafter_mlx.machine import device
from redrafter_mlx.measuring.acceptance import Draft
from redrafter_mlx.rounds.round import Transcript
from redrafter_mlx.training.filters import stretches
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.shards import as_mlx, conversations, map_shard

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
RECALL = (1, 2, 4, 8)
LEAST, MOST = 16, 256
"""Positions searched at once. Fewer are padded to a power of two, so that few shapes are compiled
and a short answer costs less than a long one: each position takes a product with a vocabulary."""
UNSCORED = 2**30


@dataclass
class Replay:
    """Sums over the texts replayed so far.

    tokens  written by the target
    rounds  (len(BUDGETS),) it would have taken at each budget
    """

    tokens: int = 0
    rounds: np.ndarray = field(default_factory=lambda: np.zeros(len(BUDGETS), int))

    @property
    def tokens_per_round(self) -> dict[int, float]:
        """By budget."""
        rates = self.tokens / np.maximum(self.rounds, 1)
        return dict(zip(BUDGETS, rates.tolist(), strict=True))

    def add(self, ranks: np.ndarray) -> None:
        """One more text, whose first token is drafted from position 0."""
        self.tokens += len(ranks)
        for i, budget in enumerate(BUDGETS):
            accepted = np.cumprod(ranks < budget - 1, axis=1).sum(axis=1)
            self.rounds[i] += _rounds(accepted)


def _rounds(accepted: np.ndarray) -> int:
    """Rounds over P tokens, where a round at position p accepts accepted[p] drafted tokens."""
    position = rounds = 0
    while position < len(accepted):
        position += int(accepted[position]) + 1
        rounds += 1
    return rounds


@dataclass(frozen=True)
class Answer:
    """What the target wrote, T tokens, after `prompt`; hidden (T, c) before its first draft and on.

    hidden[i] was seen before tokens[i] was pending: a draft from it predicts tokens[i + 1], ...
    before  (P, c) hidden states of the prompt's tokens but the last
    """

    prompt: np.ndarray
    tokens: np.ndarray
    hidden: mx.array
    before: mx.array


def greedy_answers(paths: Iterable[Path]) -> Iterator[Answer]:
    """The answers in these shards that consist of the target's likeliest tokens throughout."""
    for path in paths:
        shard = map_shard(path)
        tokens, roles, hidden = shard["tokens"], shard["roles"], shard["hidden"]
        best = shard["top_logits"].argmax(axis=-1, keepdims=True)
        likeliest = np.take_along_axis(shard["top_ids"], best, axis=-1)[:, 0]
        for start, end in conversations(shard):
            for turn in stretches(roles[start:end] == Role.ASSISTANT):
                first, last = start + turn[0], start + turn[1]
                if last - first < 2 or first - start < 2:
                    continue
                if (likeliest[first - 1 : last - 1] == tokens[first:last]).all():
                    yield Answer(
                        np.array(tokens[start:first]),
                        np.array(tokens[first:last]),
                        as_mlx(hidden[first - 1 : last - 1]),
                        as_mlx(hidden[start : first - 1]),
                    )


class Replayer:
    """A drafter's search run on one answer after another, with its current weights.

    found   the sums over the answers that were added
    drafts  everything that it scored, if they are kept
    """

    def __init__(self, drafter: BeamDrafter, width: int, length: int, keep: bool = False):
        self._drafter, self._length, self._keep = drafter, length, keep
        self._search = device.fused(
            lambda begun, root, ids, rows, memory: drafter.search(
                width, length, False, begun, root, None, None, None, ids, rows, memory
            )
        )
        self.found, self.drafts = Replay(), []

    def of(self, answer: Answer) -> tuple[np.ndarray, list[Draft]]:
        """What `add` takes: the ranks at each token of the answer, and the drafts kept there."""
        ranks, drafts = [], []
        for piece, arrays in self.pieces(answer):
            ranks.append(path_ranks(*arrays, piece.ahead)[: piece.count])
            for p in range(piece.count if self._keep else 0):
                found = collect(int(piece.roots[p]), *(array[p] for array in arrays))
                drafts.append(Draft.of(found, piece.ahead[p]))
        return np.concatenate(ranks), drafts

    def add(self, ranks: np.ndarray, drafts: list[Draft]) -> None:
        """Count one more answer."""
        self.found.add(ranks)
        self.drafts += drafts

    def pieces(self, answer: Answer) -> Iterator[tuple[_Piece, tuple[np.ndarray, ...]]]:
        """The pieces of an answer, and what `beam_search` returns for the positions of each."""
        vocabulary = self._drafter.vocabulary.of(Transcript(answer.prompt))
        for piece in _pieces(self._drafter, answer, self._length - 1):
            found = self._search(piece.begun, mx.array(piece.roots), *vocabulary, piece.memory)
            yield piece, device.read(*found)


def replay(drafter: BeamDrafter, answers: Iterable[Answer], width: int, length: int) -> Replay:
    """Draft at each token of the answers; see `Replay`."""
    replayer = Replayer(drafter, width, length)
    for answer in answers:
        replayer.add(*replayer.of(answer))
    return replayer.found


class Recaller:
    """How often the token at a depth is among the head's k likeliest, given that the head has
    read the target's own tokens up to it.
    """

    def __init__(self, drafter: BeamDrafter, depths: int):
        self._drafter, self._depths = drafter, min(depths, drafter.depths)
        self._hits = np.zeros((self._depths, len(RECALL)))
        self._total = np.zeros((self._depths, 1))
        self._ranks = device.fused(self._ranks_of)

    @property
    def found(self) -> np.ndarray:
        """(depths, len(RECALL)) shares of the answers that were added."""
        return self._hits / np.maximum(self._total, 1)

    def of(self, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """What `add` takes of an answer: hits (depths, len(RECALL)) among (depths, 1) tokens."""
        hits, total = np.zeros_like(self._hits), np.zeros_like(self._total)
        vocabulary = self._drafter.vocabulary.of(Transcript(answer.prompt))
        for piece in _pieces(self._drafter, answer, self._depths):
            tokens = mx.array(np.concatenate([piece.roots[:, None], piece.ahead], axis=1))
            (ranks,) = device.read(self._ranks(piece.begun, tokens, *vocabulary, piece.memory))
            known = (piece.ahead >= 0).T
            hits += [[((rank < k) & at).sum() for k in RECALL]
                     for rank, at in zip(ranks, known, strict=True)]  # fmt: skip
            total += known.sum(axis=1, keepdims=True)
        return hits, total

    def add(self, hits: np.ndarray, total: np.ndarray) -> None:
        """Count one more answer."""
        self._hits += hits
        self._total += total

    def _ranks_of(self, begun, tokens, ids, rows, memory):
        """(depths, P) ranks; UNSCORED outside of the vocabulary."""
        steps = self._drafter.steps(begun, memory)
        state, ranks = None, []
        for depth in range(self._depths):
            state = steps.advance(state, tokens[:, depth])
            logits = self._drafter.logits(steps, state, rows)
            here = ids[None] == tokens[:, depth + 1 : depth + 2]
            own = mx.where(here, logits, -mx.inf).max(axis=-1, keepdims=True)
            rank = (logits > own).sum(axis=-1)
            ranks.append(mx.where(here.any(axis=-1), rank, UNSCORED))
        return mx.stack(ranks)


def recall(drafter: BeamDrafter, answers: Iterable[Answer], depths: int) -> np.ndarray:
    """(depths, len(RECALL)) see `Recaller`."""
    recaller = Recaller(drafter, depths)
    for answer in answers:
        recaller.add(*recaller.of(answer))
    return recaller.found


@dataclass(frozen=True)
class _Piece:
    """`count` positions of an answer, padded (`_filled`): begun (P, c), roots (P,), and the
    tokens after them, ahead (P, depths), -1 beyond the end; memory as in a Begun.
    """

    begun: mx.array
    memory: list[mx.array]
    roots: np.ndarray
    ahead: np.ndarray
    count: int


def _pieces(drafter: BeamDrafter, answer: Answer, depths: int) -> Iterator[_Piece]:
    text = np.concatenate([answer.prompt, answer.tokens])
    captured = mx.concatenate([answer.before, answer.hidden]).astype(mx.float32)
    begun, memory = drafter.replayed(text, captured, len(answer.prompt))
    for at in range(0, len(answer.tokens), MOST):
        here = slice(at, at + MOST)
        roots = answer.tokens[here]
        size = _filled(len(roots))
        missing = size - len(roots)
        ahead = np.full((size, depths), -1)
        for depth in range(depths):
            following = answer.tokens[at + depth + 1 : at + depth + 1 + size]
            ahead[: len(following), depth] = following
        yield _Piece(
            mx.pad(begun[here], [(0, missing), (0, 0)]),
            [*memory[:-1], *(mx.pad(seen[here], (0, missing)) for seen in memory[-1:])],
            np.pad(roots, (0, missing)),
            ahead,
            len(roots),
        )


def _filled(count: int) -> int:
    """Positions to which `count` of them are padded, at most MOST: 16, 32, ..., 256."""
    return max(LEAST, 1 << (count - 1).bit_length())


def path_ranks(
    tokens: np.ndarray, logprobs: np.ndarray, survivors: np.ndarray, path: np.ndarray
) -> np.ndarray:
    """(P, L-1): how many candidates of its draft are likelier than the path's node of each depth.

    tokens, logprobs (P, M), survivors (P, L-1, W) as `beam_search` returns them
    path             (P, L-1) token ids that actually followed

    UNSCORED where the path was not scored. `TokenTree.best` takes the budget's likeliest
    candidates, so a node is in the tree if and only if its rank is below the budget less one, the
    root.
    """
    positions, steps, width = survivors.shape
    ranks = np.full((positions, steps), UNSCORED)
    rows = np.arange(positions)
    first, block = 0, np.zeros(positions, int)  # of the path's parent among its depth's beams
    alive = np.ones(positions, bool)
    for step in range(steps):
        size = width if step == 0 else width * width
        own = first + block[:, None] * width + np.arange(width)
        hit = tokens[rows[:, None], own] == path[:, step : step + 1]
        alive &= hit.any(axis=1)
        inside = block * width + hit.argmax(axis=1)
        mine = logprobs[rows, first + inside]
        likelier = (logprobs > mine[:, None]).sum(axis=1)
        ranks[alive, step] = likelier[alive]
        lives_on = survivors[:, step] == inside[:, None]
        alive &= lives_on.any(axis=1)
        block = lives_on.argmax(axis=1)
        first += size
    return ranks
