"""Tokens, caches and drafters of earlier texts, kept for prompts that begin like them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.target.caches import LayerCaches

UNREAD = 2
"""Last known tokens that are read again: drafters need the target's hidden states there."""


class Donor(Protocol):
    """A text that others may continue: said (its tokens), caches, drafter."""

    said: Sequence[int]
    caches: LayerCaches
    drafter: Drafter | None


@dataclass
class Prefix:
    """A text that no request is extending.

    name     of its drafter
    used     when it was last used: higher is later
    """

    said: Sequence[int]
    caches: LayerCaches
    drafter: Drafter | None
    name: str
    used: int = 0


class Prefixes:
    """The texts that are kept; when memory is short, the least recently used goes first."""

    def __init__(self):
        self._kept: list[Prefix] = []
        self._clock = count(1)

    def __iter__(self):
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(prefix.caches.nbytes for prefix in self._kept)

    def find(self, prompt: Sequence[int], others: Iterable[Donor]) -> tuple[Donor | None, int]:
        """The text, kept or among `others`, with most of a prompt's beginning, and its length."""
        best: tuple[Donor | None, int] = None, 0
        for donor in (*self._kept, *others):
            known = usable(donor, prompt)
            if known > best[1]:
                best = donor, known
        if isinstance(best[0], Prefix):
            best[0].used = next(self._clock)
        return best

    def remove(self, prefix: Prefix) -> None:
        """Stop keeping a text: a request continues it."""
        self._kept = [kept for kept in self._kept if kept is not prefix]

    def keep(self, prefix: Prefix) -> None:
        """Keep a text, in place of those that it makes useless because it begins with them."""
        prefix.used = next(self._clock)
        self._kept = [kept for kept in self._kept if not _replaces(prefix, kept)]
        self._kept.append(prefix)

    def shrink(self, most: int) -> None:
        """Forget the least recently used texts until the rest take at most `most` bytes."""
        self._kept.sort(key=lambda prefix: prefix.used)
        while self._kept and self.nbytes > most:
            self._kept.pop(0)


def usable(donor: Donor, prompt: Sequence[int]) -> int:
    """How many of a prompt's first tokens can be taken from a donor's caches."""
    common = common_length(donor.said, prompt[:-1])
    most = min(common - UNREAD, donor.caches.length)
    return donor.caches.forkable(most) if most > 0 else 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two texts share, in tokens."""
    size = min(len(a), len(b))
    differ = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differ.argmax()) if differ.any() else size


def _replaces(new: Prefix, old: Prefix) -> bool:
    """Whether every prompt that could use the old text can use the new one."""
    is_start = common_length(new.said, old.said) >= old.caches.length
    return is_start and (new.caches.can_be_cut or new.caches.length == old.caches.length)
