"""What is left out of the training data: answers that repeat themselves, questions seen before.

Both rules look at token ids only, so a resumed run that reads them back from the shards decides
as the first run did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

PERIODS = 64
"""Longest stretch (in tokens) whose repetition counts as a loop."""
LOOP = 16
"""Fewest repeated tokens of a loop: table rules and indents repeat fewer."""
SHINGLE = 3
BANDS, ROWS = 6, 6
"""Bands of min-hashes, and hashes of a band: a question that shares a share s of its 3-grams with
an earlier one is found with probability 1 - (1 - s^6)^6: 0.09 at 0.5, 0.84 at 0.8, 0.99 at 0.9."""
SLOTS = 1 << 20
"""Band hashes that are remembered (8 MB): about 170 000 questions before old ones fade."""


def loop_end(tokens: Sequence[int]) -> int | None:
    """Where a loop has been said twice, so that nothing new follows; None without a loop.

    tokens  (T,) token ids of one answer

    A loop is a stretch of 1 to 64 tokens said at least three times in a row, with at least 16
    repeated tokens. Example: with the loop `a b`, x a b a b a b ... gives 5, which keeps x a b a b.
    """
    said = np.asarray(tokens)
    ends = []
    for period in range(1, min(PERIODS, len(said) // 2) + 1):
        least = max(2 * period, LOOP)
        repeats = stretches(said[period:] == said[:-period])
        ends += [first + 2 * period for first, end in repeats if end - first >= least][:1]
    return min(ends, default=None)


def stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Beginning and end of each unbroken stretch of true values in (T,) bool, in order."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


class Sieve:
    """Tells new questions from near-duplicates of earlier ones, in bounded memory.

    Rule: min-hashes over the 3-grams of token ids, in bands. A question that shares a band with a
    remembered one is a near-duplicate. Each slot of the table keeps the largest hash that fell
    into it, so the order of the questions does not matter.
    """

    def __init__(self):
        draw = np.random.default_rng(0)
        self._odd = draw.integers(1, 2**63, (BANDS * ROWS, 1), np.uint64) | np.uint64(1)
        self._shift = draw.integers(0, 2**63, (BANDS * ROWS, 1), np.uint64)
        self._table = np.zeros(SLOTS, np.uint64)

    def admits(self, question: Sequence[int]) -> bool:
        """Whether no near-duplicate is remembered; if so, remember the question (token ids)."""
        bands = self._bands(question)
        slots = bands % np.uint64(SLOTS)
        if (self._table[slots] == bands).any():
            return False
        np.maximum.at(self._table, slots, bands)
        return True

    def remember(self, question: Sequence[int]) -> None:
        """Remember a question that was admitted by an earlier run."""
        bands = self._bands(question)
        np.maximum.at(self._table, bands % np.uint64(SLOTS), bands)

    def _bands(self, question: Sequence[int]) -> np.ndarray:
        """(BANDS,) uint64 hashes."""
        tokens = np.asarray(question, np.uint64)
        width = min(SHINGLE, len(tokens))
        grams = np.lib.stride_tricks.sliding_window_view(tokens, width) if width else tokens[None]
        mixed = np.zeros(len(grams), np.uint64)
        for column in grams.T:
            mixed = _mix(mixed * np.uint64(1_000_003) + column + np.uint64(1))
        lowest = _mix(mixed * self._odd + self._shift).min(axis=1).reshape(BANDS, ROWS)
        hashes = [
            hashlib.blake2b(bytes([band]) + row.tobytes(), digest_size=8).digest()
            for band, row in enumerate(lowest)
        ]
        return np.frombuffer(b"".join(hashes), np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatter 64-bit numbers; multiplying alone would leave an order in the low bits."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return values ^ (values >> np.uint64(29))
