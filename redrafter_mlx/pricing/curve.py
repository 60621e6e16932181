"""What a pass over N rows costs, and what a draft costs: measured ahead, corrected as it goes.

Shape letters: C context lengths, R sizes, W beam width, L beam length (the root included).
"""

from __future__ import annotations

import statistics
from bisect import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

SHORTEST = 1e-7
"""Seconds that anything takes at least, whatever a coarse clock says."""


class Setting(NamedTuple):
    """How far a drafter searches: beams kept, tokens of a beam with the pending one."""

    width: int
    length: int


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a pass, measured at a few context lengths and sizes.

    contexts  (C,) ascending: tokens in the KV cache before the pass
    rows      (R,) ascending: rows of the pass; the first is 1, a round of plain decoding
    seconds   (C, R)

    Raises ValueError when that is not what it is given.
    """

    contexts: Sequence[int]
    rows: Sequence[int]
    seconds: Sequence[Sequence[float]]

    def __post_init__(self):
        seconds = np.asarray(self.seconds, float)
        if seconds.shape != (len(self.contexts), len(self.rows)) or seconds.size == 0:
            raise ValueError("a cost curve needs one time for each context and number of rows")
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError("the times of a cost curve must be positive")
        for name, axis in (("contexts", self.contexts), ("rows", self.rows)):
            if not all(isinstance(x, int) for x in axis) or (np.diff(axis) <= 0).any():
                raise ValueError(f"the {name} of a cost curve must be ascending whole numbers")
        if self.rows[0] != 1 or self.contexts[0] < 0:
            raise ValueError("a cost curve begins with one row")

    def at(self, context: int, most: int) -> np.ndarray:
        """(most + 1,) seconds of a pass over as many rows as the index says; 0 rows cost nothing.

        Between measurements lines are drawn; beyond the last one its slope goes on, or none where
        that falls.
        """
        here = self._after(context)
        rows = np.arange(most + 1)
        curve = np.interp(rows, self.rows, here)
        beyond = rows > self.rows[-1]
        if beyond.any() and len(here) > 1:
            slope = (here[-1] - here[-2]) / (self.rows[-1] - self.rows[-2])
            curve[beyond] += max(slope, 0.0) * (rows[beyond] - self.rows[-1])
        curve[0] = 0.0
        return curve

    def _after(self, context: int) -> np.ndarray:
        """(R,) seconds after `context` tokens."""
        grid, contexts = self._grid, self.contexts
        if len(contexts) == 1 or context <= contexts[0]:
            return grid[0]
        if context >= contexts[-1]:
            slope = (grid[-1] - grid[-2]) / (contexts[-1] - contexts[-2])
            return grid[-1] + np.maximum(slope, 0.0) * (context - contexts[-1])
        i = bisect(contexts, context)
        share = (context - contexts[i - 1]) / (contexts[i] - contexts[i - 1])
        return grid[i - 1] + share * (grid[i] - grid[i - 1])

    @cached_property
    def _grid(self) -> np.ndarray:
        return np.asarray(self.seconds, float)

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "seconds": [[float(f"{x:.6g}") for x in row] for row in self.seconds],
        }


class Recent:
    """The typical value of the latest measurements of one thing.

    One measurement is none: the first pass of a shape compiles kernels. Of two it is the smaller,
    of more the median of the last five. After a pause of STALE none of the older ones counts.
    """

    STALE = 128

    def __init__(self):
        self._values: deque[float] = deque(maxlen=5)
        self.value: float | None = None
        self.seen_at = 0

    def add(self, value: float, now: int) -> None:
        if now - self.seen_at > self.STALE:
            self._values.clear()
        self._values.append(value)
        self.seen_at = now
        if len(self._values) == 2:
            self.value = min(self._values)
        elif len(self._values) > 2:
            self.value = statistics.median(self._values)

    def __len__(self) -> int:
        return len(self._values)


class LiveCosts:
    """What passes cost here and now: a measured curve, or none, corrected by the rounds that ran.

    Single passes vary by more than a row costs, and the cheapest-looking size is the likeliest to
    have been measured too low. So all sizes share one correction, and each has a share of its own
    that grows with its evidence, plain rounds the fastest: they are rarely timed. Without a curve
    costs rise in proportion to rows, as steeply as the passes so far say, up to the largest size
    that was tried; larger ones count as no dearer, so that they are tried when they promise
    something. They grow twofold at most, so that the first try of a loser is cheap. What was found
    is the curve for texts of twice the length or half of it, until they correct it.

    No pass costs less than one over a single row: where it looks so, the machine has changed since
    the single row was timed.
    """

    FORGET = 256
    """Passes after which a measurement counts no more if a curve can take its place: contexts grow
    and machines get warm."""
    FIRST = 8
    """Rows tried first."""
    SHORT = 256
    """Tokens of context up to which costs count as equal."""
    SLOPE = 0.01
    """What a row is thought to add to the cost of a pass before two sizes were seen."""
    DOUBT_MEASURED, DOUBT_GUESSED = 12.0, 1.0
    """Measurements of a size that weigh as much as a curve's, or a straight line's, word on it."""

    def __init__(self, curve: CostCurve | None = None):
        self._curve = curve
        self._is_measured = curve is not None
        self._recent: dict[int, Recent] = {}
        self._now = 0
        self._tried = 1
        self._around = self.SHORT  # the context that guesses are made for

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """A pass over `rows` rows after `context` tokens took `seconds`, everything included."""
        self._now += 1
        if not self._is_measured and self.is_known:
            context = max(context, self.SHORT)
            if not self._around / 2 <= context <= 2 * self._around:
                self._curve, self._recent, self._around = self._guess(), {}, context
        ratio = max(seconds, SHORTEST) / self._base(context, rows)[rows]
        recent = self._recent.setdefault(rows, Recent())
        recent.add(ratio, self._now)
        if recent.value is not None:
            self._tried = max(self._tried, rows)

    def at(self, context: int, most: int) -> np.ndarray | None:
        """(most + 1,) seconds of a pass by its rows; infinite for what is not to be tried yet.

        None while the price of a single row is unknown.
        """
        if not self.is_known:
            return None
        seconds = self._base(context, most)
        known = {rows: r for rows, r in sorted(self._recent.items()) if self._counts(rows, r)}
        if known:
            seconds = seconds * self._correction(known, most)
        if not self._is_measured:
            seconds[max(self.FIRST, 2 * self._tried) + 1 :] = np.inf
        seconds[2:] = np.maximum(seconds[2:], seconds[1])
        return seconds

    def _correction(self, known: dict[int, Recent], most: int) -> np.ndarray:
        """(most + 1,) by what the curve is to be multiplied."""
        sizes = np.array(list(known), float)
        ratios = np.array([recent.value for recent in known.values()])
        counts = np.array([len(recent) for recent in known.values()], float)
        slope = 0.0
        level = float(counts @ ratios / counts.sum())
        if self._curve is None:
            level, steps = ratios[0], sizes - 1
            evidence = counts @ steps**2
            slope = (counts @ (steps * (ratios / level - 1)) + self.SLOPE) / (evidence + 1)
            slope = max(slope, 0.0)
        doubt = np.full(len(sizes), self.DOUBT_GUESSED)
        if self._is_measured:  # a round without a draft is another kind of thing, and rarely timed
            doubt[sizes > 1] = self.DOUBT_MEASURED
        line = lambda rows: level * (1 + slope * (rows - 1))
        own = (ratios / line(sizes) - 1) * counts / (counts + doubt)
        rows = np.arange(most + 1)
        if self._curve is None:
            rows = np.clip(rows, 1, sizes[-1])  # hope: costs may fall where kernels change
        return line(rows) * (1 + np.interp(rows, sizes, own))

    def _guess(self) -> CostCurve:
        """What is known now, as a curve."""
        before = [] if self._curve is None else self._curve.rows
        rows = sorted({1, *before, *(n for n, r in self._recent.items() if r.value is not None)})
        seconds = self.at(self._around, rows[-1])[rows]
        return CostCurve([self._around], rows, [seconds.tolist()])

    @property
    def is_known(self) -> bool:
        """Whether the price of a single row is known."""
        return self._curve is not None or (1 in self._recent and self._recent[1].value is not None)

    def plain_is_stale(self, passes: int = FORGET) -> bool:
        """Whether plain decoding was last timed so many passes ago, or never."""
        plain = self._recent.get(1)
        return plain is None or self._now - plain.seen_at >= passes

    def _counts(self, rows: int, recent: Recent) -> bool:
        if recent.value is None:
            return False
        return self._curve is None or self._now - recent.seen_at < self.FORGET

    def _base(self, context: int, most: int) -> np.ndarray:
        return np.ones(most + 1) if self._curve is None else self._curve.at(context, most)


class LiveDraftCosts:
    """What drafts cost here and now, by setting.

    A setting that was neither measured ahead nor tried counts as cheap as it can be, in
    proportion to its steps: so it is tried when that would pay.
    """

    def __init__(self, measured: Mapping[Setting, float] | None = None):
        self._measured = dict(measured or {})
        self._recent: dict[Setting, Recent] = {}

    def observe(self, setting: Setting, seconds: float) -> None:
        """A draft took `seconds`."""
        ratio = max(seconds, SHORTEST) / self._base(setting)
        self._recent.setdefault(setting, Recent()).add(ratio, 0)

    def knows(self, setting: Setting) -> bool:
        """Whether it was measured ahead, or such drafts were tried."""
        own = self._recent.get(setting)
        return setting in self._measured or (own is not None and own.value is not None)

    def of(self, setting: Setting) -> float:
        """Seconds; 0 while nothing at all is known."""
        own = self._recent.get(setting)
        if own is not None and own.value is not None:
            return own.value * self._base(setting)
        others = [recent.value for recent in self._recent.values() if recent.value is not None]
        if not others:
            return self._measured.get(setting, 0.0)
        return min(others) * self._base(setting)

    def _base(self, setting: Setting) -> float:
        """Seconds if measured ahead, else a share of the largest search's."""
        if not self._measured:
            return self._size(setting)
        if setting in self._measured:
            return self._measured[setting]
        largest = max(self._measured)
        return self._measured[largest] * self._size(setting) / self._size(largest)

    @staticmethod
    def _size(setting: Setting) -> int:
        """What a search is thought to cost; no search costs one.

        Steps are what takes time: on a CPU one of four beams 10 to 60 % more than one of one.
        """
        return (setting.length - 1) * (4 + setting.width) if setting.width else 1
