"""Many conversations decoded side by side by one target, with everything that a head learns from.

A conversation is a script of parts: tokens that are given, and stretches that the target writes.
Each row of the batch plays one script after another, one column per token, until the columns
are used up. A row that starts later does not see what lies before and counts its positions from
its own start, so nothing is padded or shifted.

Shape letters: R rows, C columns fed at once, S columns so far, K likeliest tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.machine import device
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.filters import LOOP, loop_end

CHUNK = 128
"""Most given tokens of each row that one pass takes in."""
K = 32
"""Likeliest next tokens that are kept of each of the target's distributions."""
TOLERANCE = {mx.float32: 0.01}
"""How far hidden states may be off, as a share of their size and spread, by compute dtype."""
LOW_PRECISION_TOLERANCE = 0.1


class Role(IntEnum):
    """Who said a token."""

    TEMPLATE = 0
    USER = 1
    ASSISTANT = 2


@dataclass(frozen=True)
class Part:
    """A stretch of a conversation: `tokens`, or, with a `limit`, what the target writes.

    limit     most tokens to write; a conversation that reaches it ends there
    temp      temperature to write at
    stops     token ids that end what the target writes
    goes_on   at the limit the next part follows and a stop ends all, instead of the reverse
    """

    role: Role
    tokens: tuple[int, ...] = ()
    limit: int = 0
    temp: float = 0.0
    stops: frozenset[int] = frozenset()
    goes_on: bool = False


Script = Sequence[Part]


@dataclass
class Conversation:
    """What became of a script: T tokens, and the target's view after each of them.

    number        of the script, counted from 0 in the order they were taken
    tokens        (T,) int32
    roles         (T,) uint8
    hidden        (T, E) 16 bits: the final norm's output after each token, then the tapped layers'
    top_ids       (T, K) int32 likeliest next tokens, in no order
    top_logits    (T, K) float16 their logits less the highest; all zero after given tokens that
                  were read many at once, where no logits were computed
    """

    number: int
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

    number: int
    script: Script
    start: int
    queue: list[tuple[int, Role]] = field(default_factory=list)
    said: list[tuple[int, Role]] = field(default_factory=list)
    _part: int = -1
    _written: int = 0

    def __post_init__(self) -> None:
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
        stopped = token in part.stops
        if self._written >= part.limit or stopped:
            if stopped == part.goes_on or self._goes_round(self._written - 1):
                self._part = len(self.script)
            else:
                self._next_part()
        elif self._written % LOOP == 0 and self._goes_round(self._written - 1):
            self._part = len(self.script)
        if stopped and self.queue:
            # the template's own end of turn stands for whichever the target chose
            first, role = self.queue[0]
            self.queue[0] = (first, part.role if first in part.stops else role)
        else:
            self.queue.insert(0, (token, part.role))

    def _goes_round(self, written: int) -> bool:
        return written > LOOP and loop_end([token for token, _ in self.said[-written:]]) is not None

    def _next_part(self) -> None:
        """Queue given parts up to the next one that the target writes."""
        self._part, self._written = self._part + 1, 0
        while self.part and not self.part.limit:
            self.queue += [(token, self.part.role) for token in self.part.tokens]
            self._part += 1


def play(
    target: Target,
    scripts: Iterator[Script],
    rows: int,
    columns: int,
    key: mx.array,
    progress: Callable[[int, int], None] = lambda done, total: None,
    staggered: bool = True,
    enough: Callable[[int], bool] = lambda answered: False,
) -> list[Conversation]:
    """Play scripts in `rows` rows of `columns` columns; conversations in the order they end.

    key        of the sampling; the same key, scripts and target give the same conversations
    progress   told (columns done, columns)
    staggered  whether a row goes on with another script when one ends; not every model can, see
               `can_stagger`
    enough     asked after every column, with the tokens of answers so far: whether to end there

    The last conversation of each row is cut where the columns end, or where it repeats itself.
    A script begins with at least one given token.
    """
    caches = target.empty_caches()
    numbered = enumerate(scripts)
    stage = [_open(numbered, 0) for _ in range(rows)]
    ended: list[tuple[int, _Row]] = []
    seen: list[tuple[mx.array, ...]] = []
    column = answered = 0
    while column < columns and any(stage) and not enough(answered):
        count = min(CHUNK, columns - column, *(len(row.queue) for row in stage if row))
        if staggered and count - 1 == rows:  # R positions for R tokens would be a tree's, see rope
            count = max(1, count - 1)
        fed = [row.feed(count) if row else [0] * count for row in stage]
        starts = [(row.start if row else column) if staggered else 0 for row in stage]
        batch = _Rows(caches, column, starts)
        for first, last in ((0, count - 1), (count - 1, count)):  # only the last one needs logits
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
                    answered += row.part.role == Role.ASSISTANT
                    row.hear(int(choices[r]))
                else:
                    ended.append((r, row))
                    stage[r] = _open(numbered, column) if staggered else None
        progress(column, columns)
    ended += [(r, row) for r, row in enumerate(stage) if row]
    return _gather(ended, seen)


def _open(numbered: Iterator[tuple[int, Script]], column: int) -> _Row | None:
    number, script = next(numbered, (0, None))
    return None if script is None else _Row(number, script, column)


def can_stagger(target: Target) -> bool:
    """Whether rows that start later come out as they would alone: tried, on 3 short rows.

    Most models of mlx-lm take a position and a mask for each row of a batch; a few do not.
    """
    lengths = ((5, 3), (3, 4), (4, 4), (2, 4))
    draw = np.random.default_rng(0)
    scripts = [
        [Part(Role.USER, tuple(draw.integers(0, target.vocab_size, given).tolist())),
         Part(Role.ASSISTANT, limit=written)]
        for given, written in lengths
    ]  # fmt: skip
    try:
        played = play(target, iter(scripts), 3, 12, mx.random.key(0))
        tolerance = TOLERANCE.get(target.dtype, LOW_PRECISION_TOLERANCE)
        return all(_difference(target, conversation) <= tolerance for conversation in played)
    except Exception:  # whatever a model file raises when it meets a mask for each row
        return False


def _difference(target: Target, conversation: Conversation) -> float:
    """Largest relative difference of the hidden states from a pass over the conversation alone."""
    caches = target.empty_caches()
    caches.begin(len(conversation.tokens), certain=True)
    alone = target.forward(mx.array(conversation.tokens)[None], caches).hidden[0]
    alone = alone.astype(mx.float32)
    off = mx.abs(alone - conversation.hidden.astype(mx.float32)) / (mx.abs(alone) + mx.std(alone))
    return float(device.read(off.max())[0])


class _Rows:
    """What one pass's caches need to know of rows that began at different columns.

    It stands in for `target.cache.Branches`: positions, and a mask.
    """

    def __init__(self, caches, column: int, starts: Sequence[int]):
        self._caches, self._column, self._starts = caches, column, mx.array(starts)
        self._begun = starts
        self._together = not any(starts)

    def begin(self, count: int) -> None:
        self._count, self._masks = count, {}
        self._caches.restart([r for r, start in enumerate(self._begun) if start == self._column])
        self.positions = self._column if self._together else self._column - self._starts
        self._caches.begin(count, self, certain=True)

    def commit(self) -> None:
        self._caches.commit(range(self._count))
        self._column += self._count

    def mask(self, start: int, window: int | None, in_chunks: bool = False) -> mx.array | None:
        """(R, 1, C, S + C) bool: the row's own columns up to this one, within the window or chunk.

        Rows that began together need no mask of their own: (C, S + C), or None for all columns.
        """
        seen_all = window is None or self._column + self._count <= window
        if self._together and self._count == 1 and seen_all:
            return None
        if (start, window) not in self._masks:
            columns = mx.arange(start, self._column + self._count)
            here = mx.arange(self._column, self._column + self._count)[:, None]
            mask = columns <= here
            if in_chunks:
                starts = 0 if self._together else self._starts[:, None, None, None]
                mask = mask & ((columns - starts) // window == (here - starts) // window)
            elif window is not None:
                mask = mask & (here < columns + window)
            if not self._together:
                mask = mask & (columns >= self._starts[:, None, None, None])
            self._masks[start, window] = mask
        return self._masks[start, window]


def _forward(target: Target, batch: _Rows, ids: mx.array, with_logits: bool):
    """(hidden (R, C, E), top_ids (R, C, K), top_logits (R, C, K)); zeros without logits."""
    batch.begin(ids.shape[1])
    outcome = target.forward(ids, batch._caches)
    batch.commit()
    small = mx.bfloat16 if target.dtype == mx.bfloat16 else mx.float16
    hidden = outcome.hidden.astype(small)
    k = min(K, outcome.logits.shape[-1])
    if not with_logits:
        shape = (*ids.shape, k)
        return hidden, mx.zeros(shape, mx.int32), mx.zeros(shape, mx.float16)
    top_ids, logits = top_k(outcome.logits[:, -1].astype(mx.float32), k)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return hidden, top_ids.astype(mx.int32)[:, None], logits.astype(mx.float16)[:, None]


class Probe:
    """A batch of `rows` rows with `columns` made-up columns behind it, for measuring."""

    def __init__(self, target: Target, rows: int, columns: int):
        self._target, self._rows, self._column = target, rows, 0
        self.caches = target.empty_caches()
        self.hidden_size = 0
        self.step()
        if columns > 1:
            self._pretend(columns - 1)

    def step(self) -> None:
        """Feed one column and choose what follows."""
        ids = mx.zeros((self._rows, 1), mx.int32)
        batch = _Rows(self.caches, self._column, [0] * self._rows)
        views = _forward(self._target, batch, ids, True)
        key, temps = mx.random.key(0), mx.ones(self._rows)
        mx.eval(views, self.caches.state, _choose(*views[1:], temps, key))
        self.hidden_size = views[0].shape[-1]
        self._column += 1

    def _pretend(self, columns: int) -> None:
        self.caches.begin(columns, certain=True)
        for cache in self.caches.growing:
            keys, values = (
                mx.zeros((*x.shape[:2], columns, x.shape[3]), x.dtype)
                for x in cache.keys_and_values()
            )
            cache.update_and_fetch(keys, values)
        self.caches.commit(range(columns))
        mx.eval(self.caches.state)
        self._column += columns


def _choose(top_ids: mx.array, top_logits: mx.array, temps: mx.array, key: mx.array) -> mx.array:
    """(R,) ids sampled from the K likeliest at each row's temperature."""
    logits = top_logits[:, -1].astype(mx.float32)
    noise = mx.random.gumbel(logits.shape, key=key)
    best = mx.argmax(logits + temps[:, None] * noise, axis=-1, keepdims=True)
    return mx.take_along_axis(top_ids[:, -1], best, axis=-1)[:, 0]


def _gather(ended: list[tuple[int, _Row]], seen: list[tuple[mx.array, ...]]) -> list[Conversation]:
    if not seen:
        return []
    hidden, top_ids, top_logits = (
        mx.concatenate(views, axis=1) for views in zip(*seen, strict=True)
    )
    conversations = []
    for r, row in ended:
        if not row.said:
            continue
        span = slice(row.start, row.start + len(row.said))
        tokens, roles = zip(*row.said, strict=True)
        conversations.append(
            Conversation(
                row.number,
                np.array(tokens, np.int32),
                np.array(roles, np.uint8),
                hidden[r, span],
                top_ids[r, span],
                top_logits[r, span],
            )
        )
    return conversations
