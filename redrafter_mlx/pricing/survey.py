"""What passes and drafts cost on a machine that is not known yet: found out in the first rounds.

They are rounds like any other, whose tokens count, but of given sizes. So the first word of an
answer waits for nothing, and what is timed is what will be paid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from redrafter_mlx.pricing.curve import UNEVEN, Setting
from redrafter_mlx.pricing.policy import MOST_NODES

PLAIN_ROUNDS, TURNS = 3, 2
"""Times of a plain round and of every other size."""
TRIES = 2
"""Rounds that may be made for one time: a round cannot be timed if it waits for the one before."""


class Rung(NamedTuple):
    """A round to time: rows of its tree and how far to search, None for plain decoding."""

    rows: int
    setting: Setting | None


class Survey:
    """Rounds of every size, upwards and down again: the least time of each counts.

    Other work, and kernels that are compiled at first, only ever make a round take longer. Sizes
    stop where no tree can pay: it yields no more tokens than a beam has. They go on beyond 16 while
    twice the rows cost about the same. Texts may share a survey, and one may go on where another
    ended.

    full           the widest and longest search
    looks          whether the drafter finds candidates without a search
    searches       whether it searches
    passes_needed  False: only drafts are timed
    ended          told when all is known

    passes, drafts  least seconds by rows and by setting
    """

    def __init__(
        self,
        full: Setting,
        looks: bool = False,
        searches: bool = True,
        passes_needed: bool = True,
        ended: Callable[[Survey], None] = lambda survey: None,
    ):
        self.full, self._ended = full, ended
        self.passes: dict[int, float] = {}
        self.drafts: dict[Setting, float] = {}
        self.rounds = 0
        free = Setting(0, full.length)
        widest, long, short = full, Setting(1, full.length), Setting(1, 2)
        if not searches:
            widest = long = short = free
        self._widest = widest
        up = [Rung(2, short), Rung(4, long), Rung(8, widest)]
        if passes_needed:
            up.append(Rung(16, widest))
        down = [*up[:0:-1], Rung(2, free) if looks else up[0]]
        self._most = up[-1].rows
        plain = [Rung(1, None)] * PLAIN_ROUNDS if passes_needed else []
        self._passes_needed, self._ladder = passes_needed, [*plain, *up, *down]
        self._left, self._tries, self.is_over = list(self._ladder), 0, False

    @classmethod
    def confirmed(cls) -> Survey:
        """One with nothing to find out."""
        survey = cls(Setting(1, 2))
        survey.is_over = True
        return survey

    def next(self) -> Rung | None:
        """The round to make now; None: there is nothing more to find out."""
        while not self.is_over:
            while self._left:
                if self._tries < TRIES and self._may_pay(self._left[0].rows):
                    self._tries += 1
                    self.rounds += 1
                    return self._left[0]
                self._advance()
            if self._passes_needed and 1 not in self.passes:
                self._left = list(self._ladder)
            elif self._passes_needed and (rows := self._larger()):
                self._left = [Rung(rows, self._widest)] * TURNS
            else:
                self.is_over = True
                self._ended(self)
        return None

    def passed(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took `seconds`."""
        is_new = rows not in self.passes
        self.passes[rows] = min(seconds, self.passes.get(rows, seconds))
        if not self._left or self._left[0].rows != rows:
            return
        following = self._left[1].rows if len(self._left) > 1 else 0
        if is_new and following > rows and not self._may_pay(following):
            self._tries = 0  # once more, for it may have been a moment
        else:
            self._advance()

    def drafted(self, setting: Setting, seconds: float) -> None:
        """A draft took `seconds`."""
        self.drafts[setting] = min(seconds, self.drafts.get(setting, seconds))

    @property
    def costs(self) -> Mapping[int, float]:
        """Seconds of passes by rows; none costs more than one over more rows."""
        rows = sorted(self.passes)
        least = np.minimum.accumulate([self.passes[n] for n in rows][::-1])[::-1]
        return dict(zip(rows, least.tolist(), strict=True))

    def _advance(self) -> None:
        self._tries = 0
        self._left.pop(0)

    def _may_pay(self, rows: int) -> bool:
        """Whether no smaller tree was found so dear that it could not pay whatever it holds."""
        most = self.full.length * self.passes.get(1, np.inf)
        return all(seconds <= most for n, seconds in self.passes.items() if n < rows)

    def _larger(self) -> int | None:
        """The next size, if twice the rows cost hardly more the last time."""
        costs, most = self.costs, self._most
        if not {most, most // 2} <= set(costs) or costs[most] > UNEVEN * costs[most // 2]:
            return None
        self._most *= 2
        return self._most if self._most <= MOST_NODES else None
