"""Batches for training: short windows from random places of the shards, or whole conversations.

Random windows where the head allows it: neighbouring positions teach much the same, and batches
from many places made a prototype learn several times faster. Positions within a window share what
is costly, the target's distributions. A head that attends to the text with layers of its own needs
all of the text before a position, so it is trained on whole conversations.

Shape letters: B windows, L positions of a window, n steps predicted at each, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.shards import as_mlx, conversations, map_shard

LENGTH = 16
PAST = 128
"""Pasts and whole conversations are as long as a multiple of this: few shapes to compile for."""
Window = tuple[int, int, int, int]
"""Shard, beginning of the conversation, first token, end of the conversation."""


@dataclass(frozen=True)
class Batch:
    """B windows; position p of a window drafts from hidden[p] and tokens[p + 1], ...

    hidden      (B, L, E)
    tokens      (B, L + n) the tokens after each position: tokens[:, p] follows hidden[:, p]
    top_ids     (B, L + n - 1, K) likeliest tokens after tokens[:, p]
    top_logits  (B, L + n - 1, K)
    weights     (B, L + n - 1) how much it matters to predict what follows tokens[:, p]
    past        the conversations before, if they were asked for
    """

    hidden: mx.array
    tokens: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    weights: np.ndarray
    past: Past | None = None


@dataclass(frozen=True)
class Past:
    """The places of each window's conversation that its positions can look back at.

    hidden   (B, S, h) before each token, of the columns asked for
    tokens   (B, S + 1): place m is tokens[:, m], followed by tokens[:, m + 1]
    visible  (B, L) how many places each position sees
    """

    hidden: mx.array
    tokens: np.ndarray
    visible: np.ndarray


class Shards:
    """The shards of a directory, mapped into memory: only what is asked for is read.

    whole  whether a window is a conversation from its beginning to its end
    """

    def __init__(self, paths: Sequence[Path], whole: bool = False):
        self._whole = whole
        self._files = [map_shard(path) for path in paths]
        if not self._files:
            raise UserError("there is no training data yet")
        self.tokens = sum(len(file["tokens"]) for file in self._files)
        self.hidden_size = self._files[0]["hidden"].shape[1]
        for path, file in zip(paths, self._files, strict=True):
            if file["hidden"].shape[1] != self.hidden_size:
                raise UserError(f"{path} was written by another target than {paths[0]}")

    def windows(self, seed: str) -> list[Window]:
        """Every window, shuffled by the seed.

        Short windows tile each conversation from a random phase on.
        """
        draw = np.random.default_rng(list(seed.encode()))
        found = []
        for f, file in enumerate(self._files):
            for start, end in conversations(file):
                if self._whole:
                    found.append((f, start, start, end))
                    continue
                phase = int(draw.integers(LENGTH))
                for first in range(start - phase, end - 2, LENGTH):
                    predicted = file["roles"][max(first + 2, start) : first + 2 + LENGTH]
                    if (predicted != Role.TEMPLATE).any():
                        found.append((f, start, max(first, start), end))
        return [found[i] for i in draw.permutation(len(found))]

    def at_once(self, windows: int) -> int:
        """How many windows have about as many positions as this many short ones."""
        if not self._whole:
            return windows
        count = sum(len(file["starts"]) for file in self._files)
        return max(1, round(windows * LENGTH * count / self.tokens))

    def batch(self, windows: Sequence[Window], steps: int, past: slice | None = None) -> Batch:
        """Cut the windows out; what lies beyond a conversation's end has weight 0.

        past  columns of hidden states to cut out of the conversations before them as well
        """
        length = LENGTH
        if self._whole:
            longest = max(end - start for _, start, _, end in windows)
            length = -(-longest // PAST) * PAST
        reach = length + steps + 1
        spans = [(self._files[f], np.arange(a, a + reach), end) for f, _, a, end in windows]
        cut = lambda name, first, last: np.stack(
            [file[name][np.minimum(at[first:last], end - 1)] for file, at, end in spans]
        )
        hidden = cut("hidden", 0, length)
        roles = cut("roles", 2, None)
        inside = np.stack([at[2:] < end for _, at, end in spans])
        top_logits = cut("top_logits", 1, -1)
        written = (roles == Role.ASSISTANT) + 0.5 * (roles == Role.USER)
        has_view = (top_logits != 0).any(axis=-1)
        return Batch(
            hidden=as_mlx(hidden),
            tokens=cut("tokens", 1, None),
            top_ids=cut("top_ids", 1, -1),
            top_logits=top_logits,
            weights=(written * inside * has_view).astype(np.float32),
            past=self._past(windows, past) if past else None,
        )

    def _past(self, windows: Sequence[Window], columns: slice) -> Past:
        visible = np.array([first - start for _, start, first, _ in windows])[:, None]
        visible = visible + np.arange(1, LENGTH + 1)
        places = -(-int(visible.max()) // PAST) * PAST
        width, dtype = columns.stop - columns.start, self._files[0]["hidden"].dtype
        hidden = np.zeros((len(windows), places, width), dtype)
        tokens = np.zeros((len(windows), places + 1), np.int32)
        for row, (f, start, first, end) in enumerate(windows):
            count = min(first + LENGTH + 1, end) - start
            tokens[row, :count] = self._files[f]["tokens"][start : start + count]
            before = self._files[f]["hidden"][start : start + count - 2, columns]
            hidden[row, 1 : count - 1] = before
        return Past(as_mlx(hidden), tokens, visible)

    def draws(self, seed: str, size: int, first: int = 0) -> Iterator[list[Window]]:
        """Epoch after epoch of batches' windows, from the `first`-th batch on."""
        epoch = 0
        while True:
            windows = self.windows(f"{seed}/{epoch}")
            count = max(1, len(windows) // size)
            for i in range(min(first, count), count):
                yield windows[i * size : (i + 1) * size]
            first = max(0, first - count)
            epoch += 1

    def batches(self, seed: str, size: int, steps: int) -> Iterator[Batch]:
        """An endless supply of batches, in the order of `draws`."""
        return (self.batch(windows, steps) for windows in self.draws(seed, size))

    def counts(self, vocab_size: int) -> np.ndarray:
        """(V,) how often each token was written."""
        total = np.zeros(vocab_size, np.int64)
        for file in self._files:
            written = file["tokens"][file["roles"] != Role.TEMPLATE]
            total += np.bincount(written, minlength=vocab_size)
        return total


def frequent_ids(shards: Shards, most: int, vocab_size: int) -> np.ndarray:
    """The `most` token ids that were written most often, most frequent first; 0: all, in order."""
    if not most or most >= vocab_size:
        return np.arange(vocab_size)
    return np.argsort(-shards.counts(vocab_size), kind="stable")[:most]
