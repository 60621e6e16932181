"""Heads with attention layers of their own, and the keys and values that these keep of a text.

Such a head reads a token together with a hidden state: in the text the target's, before the token;
in a draft its own. Place m of its cache is what it made of the token m + 1 and the target's state
at the token m. Only tokens that the target has processed enter, never drafted ones, so whatever was
accepted, the cache is that of a fresh start on the same text.

Shape letters: T tokens, P positions drafted from, R rows of a step, S places of the buffers, F rows
drafted before, h hidden size, c size of a head's state, C captured columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.beams import BeamDrafter, Begun
from redrafter_mlx.drafters.text import OwnVocabulary, TextVocabulary
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.rounds.round import Context, Trail, Transcript, View

CHUNK = 512
"""Tokens of a text that are read in one pass, and places that the buffers begin with."""


Sees = Callable[[int], mx.array]
"""n -> bool (R, S + F): what drafted rows see, without the first n places of a text."""


class AttentionHead(nn.Module):
    """A head whose layers attend to the text and to what it drafted itself.

    caches   how many layers keep keys and values
    recalls  whether it reads its own states of the text again, so that they are kept

    A row's state (c,) is what the head makes of a token and the state before it. Caches are used as
    mlx-lm's KVCache is.
    """

    caches: int
    recalls = False

    def read(self, captured: mx.array) -> mx.array:
        """(T, h) to read in place of its own hidden states, from what was captured (T, c)."""
        return captured

    @abstractmethod
    def over(
        self, embedded: mx.array, read: mx.array, before: mx.array | None, caches: Sequence
    ) -> mx.array:
        """States (T, c) after T further tokens of a text, which follow those in the caches.

        embedded  (T, h)
        read      (T, h) of the target before each
        before    (1, c) the state after the last token in the caches; None: there is none
        """

    @abstractmethod
    def step(
        self, embedded: mx.array, states: mx.array, depth: int, sees: Sees, caches: Sequence
    ) -> mx.array:
        """States (R, c) after drafted tokens (R, h) of a depth, and the states (R, c) before them.

        The first drafted tokens are of depth 1.
        """

    def predicting(self, states: mx.array, depth: int) -> mx.array:
        """Hidden states (R, h) that predict what follows tokens of a depth, of states (R, c)."""
        return states

    def outputs(self, hidden: mx.array) -> mx.array:
        """(R, ...) what the vocabulary makes logits of, after hidden states (R, h)."""
        return hidden


class OneStateHead(AttentionHead):
    """A head whose state is one hidden state; in a text the target's takes its place."""

    @abstractmethod
    def __call__(self, embedded: mx.array, hidden: mx.array, mask, caches: Sequence) -> mx.array:
        """Hidden states (1, T, h) after token embeddings (1, T, h) and the states before them.

        mask    "causal", None, or bool, (T, places)
        caches  one for each layer
        """

    def over(
        self, embedded: mx.array, read: mx.array, before: mx.array | None, caches: Sequence
    ) -> mx.array:
        mask = "causal" if len(embedded) > 1 else None
        return self(embedded[None], read[None], mask, caches)[0]

    def step(
        self, embedded: mx.array, states: mx.array, depth: int, sees: Sees, caches: Sequence
    ) -> mx.array:
        return self(embedded[None], states[None], sees(0), caches)[0]


class TextKeys:
    """Keys and values of one layer for a text, in buffers that double. Used as mlx-lm's KVCache.

    offset  places that are held
    """

    def __init__(self):
        self.offset = 0
        self.keys = self.values = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        first, end = self.offset, self.offset + keys.shape[2]
        self.keys = _with_room(self.keys, keys, first, end)
        self.values = _with_room(self.values, values, first, end)
        self.keys[..., first:end, :] = keys
        self.values[..., first:end, :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def fork(self, places: int) -> TextKeys:
        """A copy of the first places, to be continued separately."""
        other = TextKeys()
        other.offset = min(self.offset, places)
        if self.keys is not None:
            other.keys, other.values = self.keys[...], self.values[...]
        return other


def _with_room(buffer: mx.array | None, like: mx.array, used: int, end: int) -> mx.array:
    room = CHUNK if buffer is None else buffer.shape[2]
    if buffer is not None and end <= room:
        return buffer
    while room < end:
        room *= 2
    grown = mx.zeros((*like.shape[:2], room, like.shape[3]), like.dtype)
    if buffer is not None:
        grown[..., :used, :] = buffer[..., :used, :]
    return grown


def memory_of(layers: Sequence[TextKeys], visible: mx.array) -> list[mx.array]:
    """A Begun's memory: the buffers of all layers, and (P,) how many places each position sees."""
    return [x for layer in layers for x in (layer.keys, layer.values)] + [visible]


class DraftKeys:
    """Keys and values of one layer for rows of drafts, after those of a text if there are any.

    Unlike in TextKeys nothing is written in place, so that they can be differentiated.

    offset  position of the next rows; whoever uses them sets it
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None):
        self.offset: int | mx.array = 0
        self.keys, self.values = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values


class TextLayers(ABC):
    """Keys and values of a head's layers for one text, which it follows through a Trail."""

    def __init__(self):
        self._transcript: Transcript | None = None
        self._start = 0  # place of the text that comes first in the layers
        self._layers: list[TextKeys] = []

    @abstractmethod
    def restart(self) -> None:
        """Hold nothing, in layers of the right shapes."""

    @abstractmethod
    def catch_up(self) -> None:
        """Take in all of the text that the target has processed."""

    def new(self, transcript: Transcript, trail: Trail) -> tuple[int, mx.array | None]:
        """The first place that is not held, and what was captured from there on, if anything."""
        if transcript is not self._transcript:
            is_other = self._transcript is not None or not self._layers
            self._transcript, self._trail = transcript, trail
            if is_other or self._start + self._layers[0].offset < trail.start:
                self._start = trail.start
                self.restart()
        place = self._start + self._layers[0].offset
        return place, trail.since(place, self)

    @property
    def memory(self) -> list[mx.array]:
        """That of a Begun: all that is held."""
        return memory_of(self._layers, mx.array([self._layers[0].offset]))

    def fork(self, length: int) -> TextLayers:
        """The same of another text that begins with the same `length` tokens."""
        other = copy(self)
        other._transcript, other._layers = None, []
        if self._transcript is not None and length > 0:
            self.catch_up()
        if length > 0:
            places = max(length - self._start, 0)
            other._layers = [layer.fork(places) for layer in self._layers]
        return other


class TextCache(TextLayers):
    """What a head keeps of one text: keys and values of its layers, and its last state.

    A head that recalls states keeps all of them: another text may begin with any part of this one.
    """

    def __init__(self, head: AttentionHead, embed: Callable[[mx.array], mx.array], view: View):
        super().__init__()
        self._head, self._embed, self._view = head, embed, view

    def of(self, transcript: Transcript, trail: Trail) -> Begun:
        """After all processed tokens and the pending one: (1, c), and the memory of the text."""
        first, captured = self.new(transcript, trail)
        if captured is not None:
            tokens = transcript.tokens[first + 1 : first + 1 + len(captured)]
            self._last = self.take_in(tokens, captured)[-1:]
        return self._last, self.memory

    def catch_up(self) -> None:
        self.of(self._transcript, self._trail)

    def of_whole(self, tokens: Sequence[int], captured: mx.array, first: int) -> Begun:
        """At each of P tokens from the `first` on, of a text whose states (T - 1, C) are known."""
        self.restart()
        hidden = self.take_in(tokens[1:], captured)
        return hidden[first - 1 :], memory_of(self._layers, mx.arange(first, len(tokens)))

    def take_in(self, tokens: Sequence[int], captured: mx.array) -> mx.array:
        """(T, c) after T further tokens; captured (T, C) before each of them.

        A chunk at a time; the last one is computed only when it is needed.
        """
        found = []
        for start in range(0, len(tokens), CHUNK):
            if start:
                device.finish(found[-1], [(layer.keys, layer.values) for layer in self._layers])
            ids = mx.array(tokens[start : start + CHUNK])
            read = self._head.read(self._view(captured[start : start + CHUNK]))
            before = found[-1][-1:] if found else self._last
            found.append(self._head.over(self._embed(ids), read, before, self._layers))
            if self._head.recalls:
                self._states.update_and_fetch(found[-1][None, None], found[-1][None, None, :, :1])
        return mx.concatenate(found)

    def fork(self, length: int) -> TextCache:
        other = super().fork(length)
        if other._layers and self._head.recalls:
            place = other._layers[0].offset
            other._states = self._states.fork(place)
            last = self._states.keys[0, 0, place - 1 : place] if place else None
            other._last = mx.zeros_like(self._last) if last is None else last
        return other

    def restart(self) -> None:
        """Empty buffers; nothing is evaluated to learn their shapes."""
        self._layers = [TextKeys() for _ in range(self._head.caches)]
        captured = mx.zeros((1, 1 + max(self._view.parts), self._view.size)).reshape(1, -1)
        embedded = self._embed(mx.array([0]))
        read = self._head.read(self._view(captured.astype(embedded.dtype)))
        self._last = mx.zeros_like(self._head.over(embedded, read, None, self._layers))
        self._states = TextKeys()
        for layer in self._layers:
            layer.keys, layer.values = mx.zeros_like(layer.keys), mx.zeros_like(layer.values)
            layer.offset = 0


@dataclass(frozen=True)
class State:
    """R rows of a draft: states (R, c), seen (R, F) the drafted rows before each, and itself.

    drafted  how many rows there were at each depth, F in all
    """

    hidden: mx.array
    seen: mx.array
    drafted: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.drafted)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: mx.array) -> State:
        return State(self.hidden[rows], self.seen[rows], self.drafted)


class AttentionSteps:
    """A head's steps from P positions of a text; memory as of a TextCache."""

    def __init__(
        self,
        head: AttentionHead,
        embed: Callable[[mx.array], mx.array],
        begun: mx.array,
        memory: Sequence[mx.array],
    ):
        self._head, self._embed, self._begun = head, embed, begun
        *arrays, self._visible = memory
        self._layers = [DraftKeys(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
        self._places = mx.arange(arrays[0].shape[2])

    def advance(self, state: State | None, tokens: mx.array) -> State:
        """Read further tokens; the pending ones, which come first, belong to the text already."""
        if state is None:
            return State(self._begun, mx.zeros((len(self._begun), 0), mx.bool_))
        rows = len(state)
        visible = mx.repeat(self._visible, rows // len(self._visible))[:, None]
        own = mx.eye(rows, dtype=mx.bool_)
        drafted = (*state.drafted, rows)
        found = State(state.hidden, mx.concatenate([state.seen, own], axis=1), drafted)

        def sees(hidden: int) -> mx.array:
            text, seen = self._places < visible, found.seen
            if hidden:  # they may reach into the draft, but never to a row itself
                depths = mx.array(np.repeat(np.arange(state.depth), state.drafted))
                text = text & (self._places >= hidden)
                seen = mx.concatenate([state.seen & (visible + depths >= hidden), own], axis=1)
            return mx.concatenate([text, seen], axis=1)

        for layer in self._layers:
            layer.offset = visible[:, 0] + state.depth
        embedded = self._embed(tokens)
        states = self._head.step(embedded, state.hidden, found.depth, sees, self._layers)
        return replace(found, hidden=states)

    def outputs(self, state: State) -> mx.array:
        return self._head.outputs(self._head.predicting(state.hidden, state.depth))


class AttentionDrafter(BeamDrafter):
    """Drafts by beam search with an AttentionHead.

    embed  token ids (R,) -> (R, h)
    view   what the head reads of what is captured of the target
    """

    readers = 1

    def __init__(
        self,
        head: AttentionHead,
        vocabulary: OwnVocabulary | TextVocabulary,
        embed: Callable[[mx.array], mx.array],
        view: View,
        experience: dict[float, Experience] | None = None,
    ):
        super().__init__(vocabulary, experience)
        self.head, self.embed, self.view = head, embed, view
        self._text = TextCache(head, embed, view)

    def begin(self, context: Context) -> Begun:
        return self._text.of(context.transcript, context.trail)

    def fork(self, length: int) -> AttentionDrafter:
        other = super().fork(length)
        other._text = self._text.fork(length)
        return other

    def replayed(self, tokens: Sequence[int], hidden: mx.array, first: int) -> Begun:
        return TextCache(self.head, self.embed, self.view).of_whole(tokens, hidden, first)

    def steps(self, begun: mx.array, memory: Sequence[mx.array]) -> AttentionSteps:
        return AttentionSteps(self.head, self.embed, begun, memory)
