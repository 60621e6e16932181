"""What a drafter keeps of a text: the ids it may propose, and places to look back at.

Shape letters: T tokens, R rows, h hidden size, C captured columns, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Trail, Transcript, View


class TextMemory:
    """The places that a head can look back at in one text, taken in as the text grows.

    Buffers double, so that few sizes of them are compiled for.
    """

    ROOM = 128

    def __init__(self, head: RecurrentHead, embed: Callable[[mx.array], mx.array], view: View):
        self._head, self._embed, self._view = head, embed, view
        self._transcript: Transcript | None = None
        self._start = self._places = 0  # it holds so many places, from the start on

    def of(self, transcript: Transcript, trail: Trail) -> list[mx.array]:
        """The fields of a Memory of all places before the pending token."""
        if transcript is not self._transcript:
            is_other = self._transcript is not None or trail.start > self._start + self._places
            self._transcript, self._trail, self._before = transcript, trail, None
            if is_other:
                self._start, self._places = trail.start, 0
            if self._places == 0:
                self._keys, self._values = self._buffers(self.ROOM)
        place = self._start + self._places
        is_forked = self._before is None and place > trail.start
        new = trail.since(place - is_forked, self)
        if new is not None:
            new = self._view(new)[:, self._head.config.lookback_columns]
            if is_forked:
                self._before, new = new[:1], new[1:]
            if len(new):
                self._take_in(new)
        return [self._keys, self._values, mx.array([self._places])]

    def fork(self, length: int) -> TextMemory:
        """The same of another text that begins with the same `length` tokens."""
        other = TextMemory(self._head, self._embed, self._view)
        if self._transcript is not None and length > 0:
            self.of(self._transcript, self._trail)
        if self._places and length > 0:
            other._start = self._start
            other._places = min(self._places, max(length - self._start, 0))
            other._keys, other._values = self._keys[...], self._values[...]
        return other

    def _take_in(self, hidden: mx.array) -> None:
        """Places of T tokens, whose next is known; hidden (T, h) is what is looked back at."""
        first, end = self._places, self._places + len(hidden)
        tokens = self._transcript.tokens[self._start + first : self._start + end + 1]
        last = mx.zeros_like(hidden[:1]) if self._before is None else self._before
        before = mx.concatenate([last, hidden[:-1]])
        embedded = self._embed(mx.array(tokens))[None]
        keys = self._head.lookback.keys(self._head.looked_at(before)[None], embedded[:, :-1])
        if end > self._values.shape[1]:
            room = self._values.shape[1]
            while room < end:
                room *= 2
            old = self._keys[..., :first], self._values[:, :first]
            self._keys, self._values = self._buffers(room)
            self._keys[..., :first], self._values[:, :first] = old
        self._keys[..., first:end], self._values[:, first:end] = keys, embedded[:, 1:]
        self._before, self._places = hidden[-1:], end

    def _buffers(self, room: int) -> tuple[mx.array, mx.array]:
        c = self._head.config
        dtype = self._head.lookback.key_token.weight.dtype
        if dtype == mx.uint32:  # quantised
            dtype = self._head.lookback.key_token.scales.dtype
        keys = mx.zeros((1, c.lookback_heads, c.lookback_size, room), dtype)
        return keys, mx.zeros((1, room, c.hidden_size), dtype)


class OwnVocabulary:
    """The ids (D,) of a head's own output layer, whatever the text."""

    def __init__(self, ids: mx.array):
        self._ids = ids

    def of(self, transcript: Transcript) -> tuple[mx.array, dict]:
        """Token ids (D,); `project` needs no parameters."""
        return self._ids, {}

    def fork(self) -> OwnVocabulary:
        """The same for another text."""
        return self

    def project(self, logits: mx.array, rows: dict) -> mx.array:
        """What the head's output layer gave is (R, D) logits already."""
        return logits


class SharedVocabulary(OwnVocabulary):
    """The same ids (D,) whatever the text, scored by the target's own head.

    logits  (R, h) -> (R, D)
    """

    def __init__(self, ids: mx.array, logits: Callable[[mx.array], mx.array]):
        super().__init__(ids)
        self._logits = logits

    def project(self, features: mx.array, rows: dict) -> mx.array:
        """Logits (R, D) of what the target's head would read (R, h)."""
        return self._logits(features)


class TextVocabulary:
    """The ids that a tied output proposes in one text: a static set and the ids of the text.

    static      (D,) token ids
    vocab_size  of the target
    output      token ids (D,) -> those rows of the target's head, as a linear layer

    Most of what a fixed set of some thousand ids misses in real answers stands in their prompts.
    Spare rows, filled with any other ids, keep shapes few; new ids of the text take their place,
    `BATCH` at a time, because each change copies the rows.
    """

    SPARE = 256
    BATCH = 16

    def __init__(self, static: mx.array, vocab_size: int, output: Callable[[mx.array], nn.Module]):
        self._static = np.array(static)
        self._vocab_size = vocab_size
        self._output = output
        self._linear = output(mx.array([0]))  # whose rows each text replaces by its own
        self._transcript: Transcript | None = None

    def of(self, transcript: Transcript) -> tuple[mx.array, dict]:
        """Token ids (D',), and the parameters of the linear layer that scores them."""
        if transcript is not self._transcript:
            self._transcript, self._seen = transcript, 0
            self._ids, self._known = self._static, set(self._static.tolist())
            self._waiting: list[int] = []
        tokens = transcript.tokens
        for token in tokens[self._seen :]:
            if token not in self._known:
                self._known.add(token)
                self._waiting.append(token)
        if self._seen == 0 or len(self._waiting) >= self.BATCH:
            self._take_in()
        self._seen = len(tokens)
        return self._current

    def fork(self) -> TextVocabulary:
        """The same for another text."""
        other = copy(self)
        other._transcript = None
        return other

    def _take_in(self) -> None:
        self._ids = np.concatenate([self._ids, np.array(self._waiting, self._static.dtype)])
        self._waiting = []
        spare = -len(self._ids) % self.SPARE
        others = np.setdiff1d(np.arange(self._vocab_size), self._ids)[:spare]
        ids = mx.array(np.concatenate([self._ids, others]))
        linear = self._output(ids)
        if "scales" not in linear:
            linear.weight = device.by_columns(linear.weight)
        self._current = ids, linear.parameters()

    def project(self, features: mx.array, parameters: dict) -> mx.array:
        """Logits (R, D') of what the target's head would read (R, h)."""
        self._linear.update(parameters)
        return self._linear(features)
