"""Where the end of a text occurred before: a suffix automaton that grows with the text.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). Appending a token
takes amortised constant time, and finding the longest suffix that occurred before takes constant
time, whatever the text: also one token repeated. Memory is linear: at most two states and three
transitions for each token, about 0.5 kB of Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A suffix of the text that also ends at earlier places.

    length  in tokens
    latest  index of its last token where it occurred most recently
    first   index of its last token where it occurred first
    """

    length: int
    latest: int
    first: int


class SuffixAutomaton:
    """Every substring of a text, in as many classes as there are sets of places where one ends.

    A state stands for the substrings that end at the same places: the longest has `_length`
    tokens, and `_link` leads to the state of its longest suffix that ends at more places.

    STEPS   suffixes of which the most recent place is kept up to date at each token, the longest
            first. It bounds the work where a text has very many, such as one repeated token.
    WINDOW  tokens of the text that are matched anew when tokens ahead of it are looked up
    """

    STEPS = 16
    WINDOW = 32

    def __init__(self):
        self.text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._first, self._latest = [-1], [0], [-1], [-1]
        self._end = 0  # the state of the whole text
        self._found: list[Match] = []

    def __len__(self) -> int:
        return len(self.text)

    def append(self, token: int) -> None:
        """Add a token to the end of the text."""
        place = len(self.text)
        self.text.append(token)
        end = self._state({}, -1, self._length[self._end] + 1, place, place)
        state = self._end
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = end
            state = self._link[state]
        self._link[end] = 0 if state < 0 else self._class_of(state, token)
        self._end = end
        self._found = list(self._matches(self._link[end], len(self.text)))
        state = self._link[end]
        for _ in self._found:
            self._latest[state] = place
            state = self._link[state]

    def matches(self, ahead: Sequence[int] = ()) -> list[Match]:
        """Suffixes of the text with `ahead` after it that end earlier in the text, longest first.

        At most `STEPS`, each with other places than the one before. With tokens ahead a match has
        at most `WINDOW` tokens of the text.
        """
        if not ahead:
            return self._found
        state = length = 0
        for token in (*self.text[-self.WINDOW :], *ahead):
            while state and token not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state = self._next[state][token]
                length += 1
        return list(self._matches(state, length))

    def _matches(self, state: int, length: int) -> Iterator[Match]:
        for _ in range(self.STEPS):
            if state <= 0:
                return
            yield Match(min(length, self._length[state]), self._latest[state], self._first[state])
            state = self._link[state]

    def _class_of(self, state: int, token: int) -> int:
        """The state of the longest substring of `state`, and `token` after it; split if need be."""
        after = self._next[state][token]
        length = self._length[state] + 1
        if self._length[after] == length:
            return after
        part = self._state(
            dict(self._next[after]),
            self._link[after],
            length,
            self._first[after],
            self._latest[after],
        )
        while state >= 0 and self._next[state].get(token) == after:
            self._next[state][token] = part
            state = self._link[state]
        self._link[after] = part
        return part

    def _state(self, following: dict[int, int], link: int, length: int, first: int, latest: int):
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._first.append(first)
        self._latest.append(latest)
        return len(self._next) - 1
