"""What earlier texts left: their tokens, caches and drafters, for prompts that begin like them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.target.caches import LayerCaches

UNREAD = 2
"""The last known tokens, which are read anew: drafters ask for the target's states there."""


class Donor(Protocol):
    """A text that others may go on with: said (tokens), caches, drafter."""

    said: Sequence[int]
    caches: LayerCaches
    drafter: Drafter | None


@dataclass
class Prefix:
    """A text that nobody writes on.

    name     of its drafter
    used     the higher, the later
    """

    said: Sequence[int]
    caches: LayerCaches
    drafter: Drafter | None
    name: str
    used: int = 0

    @property
    def nbytes(self) -> int:
        return self.caches.nbytes


class Prefixes:
    """Texts that were written, the least recently used of which goes first when memory is short."""

    def __init__(self):
        self._kept: list[Prefix] = []
        self._clock = count(1)

    def __iter__(self):
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept)

    def find(self, prompt: Sequence[int], others: Iterable[Donor]) -> tuple[Donor | None, int]:
        """The text, kept or one of the others, that knows most of a prompt, and how much of it."""
        best: tuple[Donor | None, int] = None, 0
        for donor in (*self._kept, *others):
            known = usable(donor, prompt)
            if known > best[1]:
                best = donor, known
        if isinstance(best[0], Prefix):
            best[0].used = next(self._clock)
        return best

    def take(self, prefix: Prefix) -> None:
        """It is kept no longer: a prompt goes on with it."""
        self._kept = [kept for kept in self._kept if kept is not prefix]

    def keep(self, prefix: Prefix) -> None:
        """Keep a text, instead of those that it begins with and that are of no more use."""
        prefix.used = next(self._clock)
        self._kept = [kept for kept in self._kept if not _replaces(prefix, kept)]
        self._kept.append(prefix)

    def shrink(self, most: int) -> None:
        """Forget the least recently used ones until all take at most so many bytes."""
        self._kept.sort(key=lambda prefix: prefix.used)
        while self._kept and self.nbytes > most:
            self._kept.pop(0)


def usable(donor: Donor, prompt: Sequence[int]) -> int:
    """How many of a prompt's first tokens a donor's caches can begin with."""
    common = common_length(donor.said, prompt[:-1])
    most = min(common - UNREAD, donor.caches.length)
    return donor.caches.forkable(most) if most > 0 else 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that two texts share."""
    size = min(len(a), len(b))
    differ = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differ.argmax()) if differ.any() else size


def _replaces(new: Prefix, old: Prefix) -> bool:
    """Whether whatever could begin with the old text can begin with the new one."""
    is_start = common_length(new.said, old.said) >= old.caches.length
    return is_start and (new.caches.can_be_cut or new.caches.length == old.caches.length)
