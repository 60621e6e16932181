"""Beam search over a recurrent drafter, entirely on the device.

Shape letters: P positions searched from, W beam width, L beam length (the root included), R live
beams (1 at the root, W after it), D draft vocabulary, M scored candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from redrafter_mlx.rounds.tree import Candidates

BLOCK = 64
"""Columns of one block of the two-level search for the likeliest tokens."""


def beam_search(
    advance: Callable[[mx.array | None, mx.array], mx.array],
    score: Callable[[mx.array, int], mx.array],
    token_ids: Callable[[mx.array], mx.array],
    root: mx.array,
    width: int,
    length: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """The `width` likeliest continuations of each `root`, and every candidate scored on the way.

    advance    (state of P·R rows or None, tokens (P·R,)) -> state; state[rows] is that of rows
    score      (state of P·R rows, depth) -> log-probabilities (P·R, D) of the tokens at that depth
    token_ids  draft ids -> token ids of the target
    root       (P,) the pending token of each of P positions; generation has one

    Each step keeps the best W of all R·D joint log-probabilities (the reference's rule: no length
    normalisation, no end-of-text handling). They always lie among each beam's own W best, which
    are the scored candidates: W at depth 1, then W·W at each further depth.

    Returns, all still on the device, tokens (P, M), cumulative logprobs (P, M), and which
    candidates of its own depth live on, best first (P, L-1, W).

    Example with W = 2, L = 3: M = 2 + 4; survivors [[0, 1], [0, 2]] says that both depth-1
    candidates were expanded and that the best beams end in the first child of each.
    """
    positions = root.size
    state, live = advance(None, root), 1
    beam_logprobs = mx.zeros((positions, 1, 1))
    tokens, logprobs, survivors = [], [], []
    for depth in range(1, length):
        likeliest, own = top_k(score(state, depth), width)
        joint = (beam_logprobs + own.reshape(positions, -1, width)).reshape(positions, -1)
        ids = token_ids(likeliest).reshape(positions, -1)
        best = mx.argsort(-joint, axis=-1)[:, :width]
        tokens.append(ids)
        logprobs.append(joint)
        survivors.append(best)
        if depth + 1 < length:
            rows = live * mx.arange(positions)[:, None] + best // width
            state = advance(
                state[rows.reshape(-1)], mx.take_along_axis(ids, best, axis=-1).reshape(-1)
            )
            live = width
            beam_logprobs = mx.take_along_axis(joint, best, axis=-1)[:, :, None]
    return (
        mx.concatenate(tokens, axis=-1),
        mx.concatenate(logprobs, axis=-1),
        mx.stack(survivors, axis=1),
    )


def top_k(values: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids (R, k) and values (R, k) of the k largest of each row (R, D), in no order.

    The k largest lie in the k blocks with the largest maxima: taking maxima and then sorting a
    few blocks is several times cheaper than sorting all.
    """
    rows, columns = values.shape
    if columns > k * BLOCK:
        padding = -columns % BLOCK
        padded = mx.pad(values, [(0, 0), (0, padding)], constant_values=-mx.inf)
        blocks = padded.reshape(rows, -1, BLOCK)
        chosen, _ = top_k(blocks.max(axis=-1), k)
        inside = mx.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
        block_ids = (chosen[:, :, None] * BLOCK + mx.arange(BLOCK, dtype=chosen.dtype)).reshape(
            rows, -1
        )
        best, top_values = top_k(inside, k)
        return mx.take_along_axis(block_ids, best, axis=-1), top_values
    ids = mx.argpartition(-values, k - 1, axis=-1)[:, :k]
    return ids, mx.take_along_axis(values, ids, axis=-1)


def collect(
    root: int, tokens: np.ndarray, logprobs: np.ndarray, survivors: np.ndarray
) -> Candidates:
    """Link what `beam_search` returned for one position, now on the host, into Candidates."""
    steps, width = survivors.shape
    first = np.concatenate([[0, width], width + width * width * np.arange(1, steps)])
    parents = [np.full(width, -1)]
    for step in range(1, steps):
        parents.append(np.repeat(first[step - 1] + survivors[step - 1], width))
    return Candidates(
        root, tokens, np.concatenate(parents), logprobs, beams=first[steps - 1] + survivors[-1]
    )
