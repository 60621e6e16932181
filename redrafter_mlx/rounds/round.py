"""What the parts of a round hand to each other: Context -> TokenTree -> Outcome -> Verdict -> Step.

Shape letters: N nodes, V vocabulary, E hidden size, C captured columns: E or a multiple of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx

from redrafter_mlx.machine import device
from redrafter_mlx.rounds.sampling import Noise
from redrafter_mlx.rounds.tree import TokenTree


class Transcript:
    """Every token so far. Those that only the device knows yet are read when they are asked for."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[Any] = [int(token) for token in tokens]  # or arrays, unread yet
        self._read = len(self._tokens)

    def extend(self, tokens: Sequence[int], pending: int | mx.array) -> None:
        """Append the tokens of a path and the pending token, an id or (1,), after them."""
        self._tokens += [*tokens, pending]

    @property
    def tokens(self) -> list[int]:
        """Token ids, the pending one last."""
        unread = [
            i for i in range(self._read, len(self._tokens)) if isinstance(self._tokens[i], mx.array)
        ]
        if unread:
            values = device.read(*(self._tokens[i] for i in unread))
            for i, value in zip(unread, values, strict=True):
                self._tokens[i] = int(value[0])
        self._read = len(self._tokens)
        return self._tokens


@dataclass(frozen=True)
class View:
    """What one drafter reads of the captured hidden states: some of their parts, side by side.

    parts  0 is the final norm's output, i the i-th tapped layer's
    size   E of each part
    """

    parts: tuple[int, ...]
    size: int

    @property
    def width(self) -> int:
        """Columns that are read."""
        return len(self.parts) * self.size

    def __call__(self, hidden: mx.array) -> mx.array:
        """(..., width) of all that was captured (..., C)."""
        first, count = self.parts[0], len(self.parts)
        if self.parts == tuple(range(first, first + count)):
            return hidden[..., first * self.size : (first + count) * self.size]
        pieces = [hidden[..., part * self.size : (part + 1) * self.size] for part in self.parts]
        return mx.concatenate(pieces, axis=-1)


class Trail:
    """Captured hidden states (C) of the processed tokens, kept until every drafter has read them.

    readers  how many drafters read it
    start    tokens before the first one that it holds
    """

    def __init__(self, readers: int = 1, start: int = 0):
        self._readers = readers
        self._read: dict[int, int] = {}
        self._pieces: list[mx.array] = []
        self.start = self._length = start

    def add(self, hidden: mx.array) -> mx.array:
        """Append the states (T, C) of the tokens processed next; returns the array that is kept."""
        self._pieces.append(mx.contiguous(hidden))
        self._length += len(hidden)
        return self._pieces[-1]

    def since(self, first: int, reader: object) -> mx.array | None:
        """(T, C) from the `first` processed token on; `reader` will not ask for them again."""
        start = self._length
        found: list[mx.array] = []
        while start > first:
            assert len(found) < len(self._pieces), "these states were read by all and forgotten"
            found.append(self._pieces[-1 - len(found)])
            start -= len(found[-1])
        self._read[id(reader)] = self._length
        if len(self._read) >= self._readers:
            self._forget(min(self._read.values()))
        return mx.concatenate(found[::-1])[first - start :] if found else None

    def _forget(self, before: int) -> None:
        start = self._length - sum(map(len, self._pieces))
        while self._pieces and start + len(self._pieces[0]) <= before:
            start += len(self._pieces.pop(0))


@dataclass(frozen=True)
class Context:
    """What the target has verified: all that a drafter and a rule may build on.

    pending     (1,) the token the target has chosen but not yet processed
    hidden      (1, C) what was captured at the last processed token: the final norm's output, which
                the target's own head reads, then the tapped layers'; zeros before the first token
    position    of the pending token
    transcript  every token up to and including the pending one
    caches      the target's own memory of the text; only the target uses it
    noise       what sampling will add to the target's logits; None at temperature 0
    trail       of what was captured at all processed tokens; None if no drafter asked for it
    """

    pending: mx.array
    hidden: mx.array
    position: int
    transcript: Transcript
    caches: Any = field(repr=False)
    noise: Noise | None = None
    trail: Trail | None = None


@dataclass(frozen=True)
class Outcome:
    """One pass of the target over the rows of a tree: logits (N, V) and hidden states (N, C)."""

    logits: mx.array
    hidden: mx.array


@dataclass(frozen=True)
class Verdict:
    """The path that stands, as rows of the tree from the root on, and the next pending token (1,).

    token  the pending token's id; None while only the device knows it
    """

    path: Sequence[int]
    pending: mx.array
    token: int | None


@dataclass(frozen=True)
class Step:
    """One finished round: the tokens it added to the text, and where its time went.

    accepted  drafted tokens of the path; the next pending token follows them
    verdict   of the round
    logits    (len(accepted) + 1, V) the target's, row i for the i-th added token
    tree      that was verified
    draft_seconds, verify_seconds  of the round's wall time
    """

    accepted: Sequence[int]
    verdict: Verdict
    logits: mx.array
    tree: TokenTree
    draft_seconds: float
    verify_seconds: float

    @property
    def nodes(self) -> int:
        """Size of the tree that was verified."""
        return len(self.tree)

    @property
    def drafted(self) -> int:
        """Tokens of the tree that a drafter proposed."""
        return len(self.tree.without_filling(self.verdict.path)[0]) - 1

    @property
    def is_known(self) -> bool:
        """Whether the tokens can be read without waiting for the device."""
        return self.verdict.token is not None

    @cached_property
    def tokens(self) -> list[int]:
        """The added tokens."""
        token = self.verdict.token
        if token is None:
            token = int(device.read(self.verdict.pending)[0][0])
        return [*self.accepted, token]
