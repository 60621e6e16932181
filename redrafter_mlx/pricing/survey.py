"""What passes and drafts cost on a machine that is not known yet: found out in the first rounds.

They are rounds like any other, whose tokens count, but of given sizes. So the first word of an
answer waits for nothing, and what is timed is what will be paid.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from redrafter_mlx.pricing.curve import UNEVEN, Setting
from redrafter_mlx.pricing.policy import MOST_NODES

TRIES = 3
"""Rounds that a text may make for one time: a first draft reads the prompt, and what waits for the
round before it cannot be timed."""


class Rung(NamedTuple):
    """A round to time.

    rows     of its tree
    setting  how far to search; None for plain decoding
    times    wanted of this size
    """

    rows: int
    setting: Setting | None
    times: int


@dataclass
class Times:
    """What texts of about the same length have found out so far.

    Other work, and kernels that are compiled at first, make a round take longer; and a plain round
    looks short if it ends when the text comes to be alone. So the least time of a tree counts, and
    of plain rounds the median.

    passes   seconds of each pass, by rows
    drafts   least seconds by setting
    rounds   made
    is_over  whether all is known
    """

    passes: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    drafts: dict[Setting, float] = field(default_factory=dict)
    rounds: int = 0
    is_over: bool = False

    @property
    def seconds(self) -> float:
        """That the timed passes took."""
        return sum(map(sum, self.passes.values()))

    @property
    def costs(self) -> Mapping[int, float]:
        """Seconds of passes by rows; none costs more than one over more rows."""
        rows = sorted(self.passes)
        typical = [(min if n > 1 else statistics.median)(self.passes[n]) for n in rows]
        least = np.minimum.accumulate(typical[::-1])[::-1]
        return dict(zip(rows, least.tolist(), strict=True))


class Survey:
    """One text's rounds of every size, upwards and down again.

    Sizes stop where no tree can pay: it yields no more tokens than a beam has. They go on beyond 16
    while twice the rows cost about the same. What one text leaves open another finds out. Of drafts
    that would not pay if trees cost nothing, each size is seen once, so that others find it known.

    full           the widest and longest search
    looks          whether the drafter finds candidates without a search
    searches       whether it searches
    passes_needed  False: only drafts are timed
    times          that texts share
    ended          told when all is known
    """

    def __init__(
        self,
        full: Setting,
        looks: bool = False,
        searches: bool = True,
        passes_needed: bool = True,
        times: Times | None = None,
        ended: Callable[[Times], None] = lambda times: None,
    ):
        self.times = Times() if times is None else times
        self._most_tokens, self._passes_needed, self._ended = full.length, passes_needed, ended
        free = Setting(0, full.length)
        widest, long, short = full, Setting(1, full.length), Setting(1, 2)
        if not searches:
            widest = long = short = free
        sizes = [(2, short), (4, long), (8, widest)]
        if passes_needed:
            sizes.append((16, widest))
        up = [Rung(rows, setting, 1) for rows, setting in sizes]
        down = [Rung(rows, setting, 2) for rows, setting in sizes[:0:-1]]
        self._ladder = [*up, *down, Rung(2, free if looks else short, 2)]
        if passes_needed:
            more = [Rung(rows, widest, 2) for rows in (MOST_NODES // 2, MOST_NODES)]
            self._ladder = [Rung(1, None, 3), *self._ladder, *more]
        self._tries: Counter[Rung] = Counter()

    @classmethod
    def confirmed(cls) -> Survey:
        """One with nothing to find out."""
        return cls(Setting(1, 2), times=Times(is_over=True))

    def next(self, might_pay: bool = True) -> Rung | None:
        """The round to make now; None: there is nothing more to find out.

        might_pay  whether drafts would pay if trees cost nothing
        """
        while not self.times.is_over:
            for rung in self._ladder:
                if self._is_wanted(rung, might_pay):
                    self._tries[rung] += 1
                    self.times.rounds += 1
                    return rung
            if len(self.times.passes) > self._passes_needed:  # a tree's, not only plain ones
                self.times.is_over = True
                self._ended(self.times)
            self._tries.clear()
        return None

    def passed(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took `seconds`."""
        self.times.passes[rows].append(seconds)

    def drafted(self, setting: Setting, seconds: float) -> None:
        """A draft took `seconds`."""
        drafts = self.times.drafts
        drafts[setting] = min(seconds, drafts.get(setting, seconds))

    def _is_wanted(self, rung: Rung, might_pay: bool) -> bool:
        known = len(self.times.passes.get(rung.rows, ()))
        limit = TRIES * rung.times if rung.setting is None else TRIES
        if rung.setting is not None and not might_pay and (known or rung.rows > 16):
            return False
        return known < rung.times and self._tries[rung] < limit and self._may_pay(rung.rows)

    def _may_pay(self, rows: int) -> bool:
        """Whether no smaller tree was found so dear that this one could not pay."""
        costs = self.times.costs
        if rows > 16:
            most, before = costs.get(rows // 2), costs.get(rows // 4, 0.0)
            return most is not None and most <= UNEVEN * before
        most = self._most_tokens * costs.get(1, np.inf)
        return all(seconds <= most for n, seconds in costs.items() if 1 < n < rows)
