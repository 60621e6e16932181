"""Many conversations decoded side by side by one target, with all that a head learns from.

A conversation is a script of parts: tokens that are given, and stretches that the target writes.
Each row of the batch plays one script after the other, one column per token, until the columns
are used up. Rows that start later simply do not see what lies before: rotary positions are
relative, so no padding and no shifting is needed.

Shape letters: R rows, C columns fed at once, S columns so far, K likeliest tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import mlx.core as mx
import numpy as np

from redrafter_mlx import device
from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.target.adapter import Target

CHUNK = 128
"""Most given tokens of each row that one pass takes in."""
K = 32
"""Likeliest next tokens that are kept of each of the target's distributions."""


class Role(IntEnum):
    """Who said a token."""

    TEMPLATE = 0
    USER = 1
    ASSISTANT = 2
    NOBODY = 3


@dataclass(frozen=True)
class Part:
    """A stretch of a conversation: `tokens`, or, with a `limit`, what the target writes.

    limit     most tokens to write; a conversation that reaches it ends there
    temp      temperature to write at
    """

    role: Role
    tokens: tuple[int, ...] = ()
    limit: int = 0
    temp: float = 0.0


Script = Sequence[Part]


@dataclass
class Conversation:
    """What became of a script: T tokens, and the target's view after each of them.

    tokens        (T,) int32
    roles         (T,) uint8
    hidden        (T, E) the final norm's output after each token
    top_ids       (T, K) int32 likeliest next tokens, in no order
    top_logits    (T, K) float16 their logits below the highest; all zero where nothing followed
                  that the target wrote
    """

    tokens: np.ndarray
    roles: np.ndarray
    hidden: mx.array
    top_ids: mx.array
    top_logits: mx.array


@dataclass
class _Row:
    """A script being played.

    queue  (token, role) pairs that are decided but not yet fed; never empty while it plays
    """

    script: Script
    start: int
    stops: Collection[int]
    queue: list[tuple[int, Role]] = field(default_factory=list)
    said: list[tuple[int, Role]] = field(default_factory=list)
    _part: int = -1
    _written: int = 0

    def __post_init__(self):
        self._next_part()

    @property
    def part(self) -> Part | None:
        return self.script[self._part] if self._part < len(self.script) else None

    @property
    def temp(self) -> float:
        return self.part.temp if self.part else 0.0

    def feed(self, count: int) -> list[int]:
        """Take `count` tokens from the queue."""
        fed, self.queue = self.queue[:count], self.queue[count:]
        self.said += fed
        return [token for token, _ in fed]

    def hear(self, token: int) -> None:
        """The target's choice after all that was fed."""
        part = self.part
        assert part is not None
        self._written += 1
        if token not in self.stops:
            self.queue = [(token, part.role)]
            if self._written >= part.limit:
                self._part = len(self.script)
            return
        self._next_part()
        if not self.queue:
            self.queue = [(token, part.role)]
        else:  # the template's own end of turn stands for whichever the target chose
            self.queue[0] = (self.queue[0][0], part.role)

    def _next_part(self) -> None:
        """Queue given parts up to the next one that the target writes."""
        self._part, self._written = self._part + 1, 0
        while self.part and not self.part.limit:
            self.queue += [(token, self.part.role) for token in self.part.tokens]
            self._part += 1


def play(
    target: Target,
    scripts: Iterator[Script],
    stops: Collection[int],
    rows: int,
    columns: int,
    key: mx.array,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Conversation]:
    """Play scripts in `rows` rows of `columns` columns; conversations in the order they end.

    stops     token ids that end what the target writes
    key       of the sampling; the same key, scripts and target give the same conversations
    progress  told (columns done, columns)

    The last conversation of each row is cut where the columns end.
    """
    caches = target.empty_caches()
    stage = [_open(scripts, 0, stops) for _ in range(rows)]
    ended: list[tuple[int, _Row]] = []
    seen: list[tuple[mx.array, ...]] = []
    column = 0
    while column < columns and any(stage):
        count = min(CHUNK, columns - column, *(len(row.queue) for row in stage if row))
        fed = [row.feed(count) if row else [0] * count for row in stage]
        starts = [row.start if row else column for row in stage]
        batch = _Rows(caches, column, starts)
        for first, last in ((0, count - 1), (count - 1, count)):  # the head reads the last one only
            if first < last:
                ids = mx.array([tokens[first:last] for tokens in fed])
                views = _forward(target, batch, ids, last == count)
                mx.eval(views, caches.state)
                seen.append(views)
        column += count
        key, here = mx.random.split(key)
        temps = mx.array([row.temp if row else 0.0 for row in stage])
        (choices,) = device.read(_choose(*seen[-1][1:], temps, here))
        for r, row in enumerate(stage):
            if row and not row.queue:
                if row.part:
                    row.hear(int(choices[r]))
                else:
                    ended.append((r, row))
                    stage[r] = _open(scripts, column, stops)
        progress(column, columns)
    ended += [(r, row) for r, row in enumerate(stage) if row]
    return _gather(ended, seen)


def _open(scripts: Iterator[Script], column: int, stops: Collection[int]) -> _Row | None:
    script = next(scripts, None)
    return None if script is None else _Row(script, column, stops)


class _Rows:
    """What one pass's caches need to know of rows that began at different columns.

    It stands in for `target.cache.Branches`: positions, and a mask.
    """

    def __init__(self, caches, column: int, starts: Sequence[int]):
        self._caches, self._column, self._starts = caches, column, mx.array(starts)[:, None, None]
        self._all_began_first = not any(starts)

    def begin(self, count: int) -> None:
        self._count, self._masks = count, {}
        self.positions = self._column
        self._caches.begin(count, self)

    def commit(self) -> None:
        self._caches.commit(range(self._count))
        self._column += self._count

    def mask(self, start: int, window: int | None) -> mx.array | str | None:
        """(R, 1, C, S + C) bool: the row's own columns up to this one, within the window."""
        if self._all_began_first and window is None:
            return None if self._count == 1 else "causal"
        if (start, window) not in self._masks:
            columns = mx.arange(start, self._column + self._count)[None, None]
            here = mx.arange(self._column, self._column + self._count)[None, :, None]
            mask = (columns >= self._starts) & (columns <= here)
            if window is not None:
                mask = mask & (here < columns + window)
            self._masks[start, window] = mask[:, None]
        return self._masks[start, window]


def _forward(target: Target, batch: _Rows, ids: mx.array, with_logits: bool):
    """(hidden (R, C, E), top_ids (R, C, K), top_logits (R, C, K)); zeros without logits."""
    batch.begin(ids.shape[1])
    outcome = target.forward(ids, batch._caches)
    batch.commit()
    small = mx.bfloat16 if target.dtype == mx.bfloat16 else mx.float16
    hidden = outcome.hidden.astype(small)
    if not with_logits:
        shape = (*ids.shape, K)
        return hidden, mx.zeros(shape, mx.int32), mx.zeros(shape, mx.float16)
    top_ids, logits = top_k(outcome.logits[:, -1].astype(mx.float32), K)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return hidden, top_ids.astype(mx.int32)[:, None], logits.astype(mx.float16)[:, None]


def _choose(top_ids: mx.array, top_logits: mx.array, temps: mx.array, key: mx.array) -> mx.array:
    """(R,) ids sampled from the K likeliest at each row's temperature."""
    logits = top_logits[:, -1].astype(mx.float32)
    noise = mx.random.gumbel(logits.shape, key=key)
    best = mx.argmax(logits + temps[:, None] * noise, axis=-1, keepdims=True)
    return mx.take_along_axis(top_ids[:, -1], best, axis=-1)[:, 0]


def _gather(ended: list[tuple[int, _Row]], seen: list[tuple[mx.array, ...]]) -> list[Conversation]:
    hidden, top_ids, top_logits = (mx.concatenate(views, axis=1) for views in zip(*seen, strict=True))
    conversations = []
    for r, row in ended:
        if not row.said:
            continue
        span = slice(row.start, row.start + len(row.said))
        tokens, roles = zip(*row.said, strict=True)
        conversations.append(
            Conversation(
                np.array(tokens, np.int32),
                np.array(roles, np.uint8),
                hidden[r, span],
                top_ids[r, span],
                top_logits[r, span],
            )
        )
    return conversations
