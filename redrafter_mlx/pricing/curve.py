"""What a pass over N rows costs, and what a draft costs: measured, and corrected by each round.

Shape letters: C context lengths, R sizes, W beam width, L beam length (the root included).
"""

from __future__ import annotations

import statistics
from bisect import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

SHORTEST = 1e-7
"""Least seconds that anything takes, whatever a coarse clock says."""

UNEVEN = 1.25
"""Largest ratio of two measurements of the same thing on a machine that does nothing else."""


def is_impossible(rows: Any, seconds: Any, alone: Any) -> Any:
    """Whether a pass over `rows` rows looks dearer than its rows one after the other.

    No pass is; one more row is allowed for the host's work. Numbers, or arrays that broadcast.
    """
    return seconds > UNEVEN * alone * (rows + 1)


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

    Raises ValueError for anything else.
    """

    contexts: Sequence[int]
    rows: Sequence[int]
    seconds: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
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

    @property
    def is_disturbed(self) -> bool:
        """Whether something else was using the processor when it was measured."""
        alone = self._grid[:, :1]
        return bool(is_impossible(np.asarray(self.rows), self._grid, alone).any())

    def at(self, context: int, most: int) -> np.ndarray:
        """(most + 1,) seconds of a pass over as many rows as the index says; 0 rows cost nothing.

        Linear between measurements; beyond the last one the slope continues, if it is not negative.
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

    def with_context(self, context: int, seconds: Mapping[int, float]) -> CostCurve:
        """The curve with the times of one context added or replaced.

        seconds  by rows, of one row at least

        Sizes that were measured at some contexts only are concluded at the others as in `at`.
        """
        kept = {
            c: dict(zip(self.rows, row, strict=True))
            for c, row in zip(self.contexts, self.seconds, strict=True)
        }
        kept[context] = dict(seconds)
        rows = sorted({*self.rows, *seconds})
        grid = []
        for c in sorted(kept):
            own = CostCurve([c], sorted(kept[c]), [[kept[c][n] for n in sorted(kept[c])]])
            grid.append(own.at(c, rows[-1])[rows].tolist())
        return CostCurve(sorted(kept), rows, grid)

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "seconds": [[float(f"{x:.6g}") for x in row] for row in self.seconds],
        }


class Recent:
    """The typical value of the latest measurements of one thing.

    A single measurement does not count: the first pass of a shape compiles kernels. Of two the
    smaller one counts, of more the median of the last five. After a pause of STALE the older ones
    are forgotten.
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


class Untried:
    """Rounds since something was last tried: its cost may have fallen meanwhile."""

    def __init__(self):
        self._rounds, self._most = 0, Recent.STALE

    @property
    def is_long(self) -> bool:
        """Whether its cost should be measured again."""
        return self._rounds >= self._most

    def count(self, is_tried: bool) -> None:
        """A round is over."""
        self._rounds = 0 if is_tried else self._rounds + 1

    def confirm(self) -> None:
        """It was measured and costs what it did: the next time may be later."""
        self._rounds, self._most = 0, 4 * self._most


class LiveCosts:
    """What passes cost here and now: a measured curve, corrected by the rounds that ran.

    Single passes vary by more than a row costs, and the cheapest-looking size is the likeliest to
    have been measured too low. So all sizes share one correction, and each has one of its own whose
    weight grows with its evidence; that of plain rounds grows fastest, as they are rarely timed and
    differ in kind. No pass costs less than one over a single row: if it looks so, the machine has
    changed since the single row was timed.

    untried  rounds since a tree was verified
    """

    FORGET = 256
    """Passes after which a measurement no longer counts: contexts grow and machines get warm."""
    DOUBT = 12.0
    """Measurements of a size that weigh as much as the curve; for one row a single one does."""
    PROOF = 3
    """Measurements of a size that suffice to show that the curve as a whole is wrong."""

    def __init__(self, curve: CostCurve):
        self.curve = curve
        self._recent: dict[int, Recent] = {}
        self._now = 0
        self.untried = Untried()

    @property
    def is_outdated(self) -> bool:
        """Whether passes take far less time now than the curve says.

        Other programs only ever make them take longer, so the curve was measured in a time of
        trouble, or in a slower mode of the machine. Its cost of more rows says little about now.
        """
        return any(value * UNEVEN < 1 for value in self._proven)

    @property
    def is_troubled(self) -> bool:
        """Whether passes take far more time now than the curve says."""
        return any(value > UNEVEN for value in self._proven)

    @property
    def _proven(self) -> list[float]:
        known = self._known().values()
        return [r.value for r in known if r.value is not None and len(r) >= self.PROOF]

    def _known(self) -> dict[int, Recent]:
        """What was measured recently, by rows."""
        return {
            rows: recent
            for rows, recent in sorted(self._recent.items())
            if recent.value is not None and self._now - recent.seen_at < self.FORGET
        }

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """A pass over `rows` rows after `context` tokens took `seconds`, everything included."""
        self._now += 1
        ratio = max(seconds, SHORTEST) / self.curve.at(context, rows)[rows]
        self._recent.setdefault(rows, Recent()).add(ratio, self._now)

    def at(self, context: int, most: int) -> np.ndarray:
        """(most + 1,) seconds of a pass by its rows."""
        seconds = self.curve.at(context, most) * self._correction(most)
        seconds[2:] = np.maximum(seconds[2:], seconds[1])
        return seconds

    def corrected(self, context: int) -> dict[int, float]:
        """Seconds by rows, for the curve's rows, as passes cost now after `context` tokens."""
        seconds = self.at(context, self.curve.rows[-1])
        return {rows: float(seconds[rows]) for rows in self.curve.rows}

    def _correction(self, most: int) -> np.ndarray:
        """(most + 1,) factors of the curve."""
        known = self._known()
        if not known:
            return np.ones(most + 1)
        sizes = np.array(list(known), float)
        ratios = np.array([recent.value for recent in known.values()])
        counts = np.array([len(recent) for recent in known.values()], float)
        level = float(counts @ ratios / counts.sum())
        doubt = np.where(sizes > 1, self.DOUBT, 1.0)
        own = (ratios / level - 1) * counts / (counts + doubt)
        return level * (1 + np.interp(np.arange(most + 1), sizes, own))


class LiveDraftCosts:
    """What drafts cost here and now, by setting.

    measured  seconds of some settings
    untried   rounds since a search was made

    The cost of a search is a constant, a part for each step, and a part for each beam of a step
    (steps take most of it: on a CPU one of four beams costs 10 to 60 % more than one of one beam).
    So the cost of a setting that was not measured follows from those that were.
    """

    def __init__(self, measured: Mapping[Setting, float] | None = None):
        self.measured = dict(measured or {})
        self._recent: dict[Setting, Recent] = {}
        self._parts = self._fit()
        self._now = 0
        self.untried = Untried()

    def pass_round(self) -> None:
        """A round begins, drafted or not: the recent times of drafts are one round older."""
        self._now += 1

    def observe(self, setting: Setting, seconds: float) -> None:
        """A draft took `seconds`."""
        ratio = max(seconds, SHORTEST) / self._base(setting)
        self._recent.setdefault(setting, Recent()).add(ratio, self._now)

    def of(self, setting: Setting) -> float:
        """Seconds of a draft; 0 while nothing at all is known."""
        ratios = self._ratios()
        if setting in ratios:
            return ratios[setting] * self._base(setting)
        if not self.measured:
            return 0.0
        kind = [ratio for s, ratio in ratios.items() if bool(s.width) == bool(setting.width)]
        return self._base(setting) * (statistics.median(kind) if kind else 1.0)

    @property
    def is_shunned(self) -> bool:
        """Whether none of the recent rounds had a draft that was timed."""
        return self._now > 0 and not self._ratios()

    def least(self) -> dict[Setting, float]:
        """Least seconds of all settings that were measured or drafted.

        Other programs only ever make a draft take longer, and one that looks too dear is not made,
        so the error would stay. One that looks too cheap is made, and then its time is known.
        """
        tried = {*self.measured, *self._ratios()}
        return {s: min(self.of(s), self.measured.get(s, np.inf)) for s in tried}

    def _ratios(self) -> dict[Setting, float]:
        """Recent times of drafts over those measured before."""
        return {
            setting: recent.value
            for setting, recent in self._recent.items()
            if recent.value is not None and self._now - recent.seen_at < LiveCosts.FORGET
        }

    def _base(self, setting: Setting) -> float:
        """Seconds as measured, or as concluded from the settings that were."""
        if setting in self.measured:
            return self.measured[setting]
        return (
            max(float(self._parts @ self._work(setting)), SHORTEST) if setting.width else SHORTEST
        )

    def _fit(self) -> np.ndarray:
        """(3,) seconds of a search, of each step, of each beam of a step, by least squares."""
        searches = {s: seconds for s, seconds in self.measured.items() if s.width}
        if not searches:
            return np.zeros(3)
        work = np.array([self._work(s) for s in searches], float)
        return np.linalg.lstsq(work, np.array(list(searches.values())), rcond=None)[0]

    @staticmethod
    def _work(setting: Setting) -> tuple[int, int, int]:
        steps = setting.length - 1
        return 1, steps, steps * setting.width
