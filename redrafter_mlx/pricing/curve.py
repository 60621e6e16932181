"""What a pass over N rows costs, and what a draft costs: measured ahead, corrected by each round.

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
"""Seconds that anything takes at least, whatever a coarse clock says."""

UNEVEN = 1.25
"""How far one measurement may be off another on a machine that does nothing else."""


def is_impossible(rows: Any, seconds: Any, alone: Any) -> Any:
    """Whether a pass of so many rows looks dearer than its rows one after the other.

    None can be; one row more is for what the host does. Numbers, or arrays that broadcast.
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

    Raises ValueError when that is not what it is given.
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

    def with_context(self, context: int, seconds: Mapping[int, float]) -> CostCurve:
        """The curve with passes of one more context, in place of what it said of that before.

        seconds  by rows, of one row at least; between and beyond them as `at` does it
        """
        own = CostCurve([context], sorted(seconds), [[seconds[n] for n in sorted(seconds)]])
        kept = {c: row for c, row in zip(self.contexts, self.seconds, strict=True) if c != context}
        kept[context] = own.at(context, self.rows[-1])[list(self.rows)].tolist()
        return CostCurve(sorted(kept), self.rows, [kept[c] for c in sorted(kept)])

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


class Untried:
    """Rounds since something was last tried: what it costs may have become less meanwhile."""

    def __init__(self):
        self._rounds, self._most = 0, Recent.STALE

    @property
    def is_long(self) -> bool:
        """Whether it should be looked at."""
        return self._rounds >= self._most

    def count(self, is_tried: bool) -> None:
        """A round is over."""
        self._rounds = 0 if is_tried else self._rounds + 1

    def confirm(self) -> None:
        """It was looked at, and costs what it did: the next time may be later."""
        self._rounds, self._most = 0, 4 * self._most


class LiveCosts:
    """What passes cost here and now: a measured curve, corrected by the rounds that ran.

    Single passes vary by more than a row costs, and the cheapest-looking size is the likeliest to
    have been measured too low. So all sizes share one correction, and each has a share of its own
    that grows with its evidence, plain rounds the fastest: they are another kind of thing, and
    rarely timed. No pass costs less than one over a single row: where it looks so, the machine has
    changed since the single row was timed.

    untried  rounds since a tree was verified
    """

    FORGET = 256
    """Passes after which a measurement counts no more: contexts grow and machines get warm."""
    DOUBT = 12.0
    """Measurements of a size that weigh as much as the curve's word on it; of one row, one."""
    PROOF = 3
    """Measurements of a size from which on they may say that the curve is wrong altogether."""

    def __init__(self, curve: CostCurve):
        self.curve = curve
        self._recent: dict[int, Recent] = {}
        self._now = 0
        self.untried = Untried()

    @property
    def is_outdated(self) -> bool:
        """Whether passes take far less time now than the curve says.

        What else runs only ever makes them take more, so the curve is of a time of trouble, or of
        a slower mode of the machine. What more rows cost then says little about now.
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
        """What was measured of late, by rows."""
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
        """Seconds by rows, of the curve's rows, as they look now after `context` tokens."""
        seconds = self.at(context, self.curve.rows[-1])
        return {rows: float(seconds[rows]) for rows in self.curve.rows}

    def _correction(self, most: int) -> np.ndarray:
        """(most + 1,) by what the curve is to be multiplied."""
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

    A search takes something once, something for each step, and something for each beam of a step
    (steps are what takes time: on a CPU one of four beams 10 to 60 % more than one of one). So what
    a setting costs that was not measured follows from those that were.
    """

    def __init__(self, measured: Mapping[Setting, float] | None = None):
        self.measured = dict(measured or {})
        self._recent: dict[Setting, Recent] = {}
        self._parts = self._fit()
        self._now = 0
        self.untried = Untried()

    def pass_round(self) -> None:
        """A round begins, drafted or not: what drafts took lately is a round older."""
        self._now += 1

    def observe(self, setting: Setting, seconds: float) -> None:
        """A draft took `seconds`."""
        ratio = max(seconds, SHORTEST) / self._base(setting)
        self._recent.setdefault(setting, Recent()).add(ratio, self._now)

    def of(self, setting: Setting) -> float:
        """Seconds; 0 while nothing at all is known."""
        ratios = self._ratios()
        if setting in ratios:
            return ratios[setting] * self._base(setting)
        if not self.measured:
            return 0.0
        kind = [ratio for s, ratio in ratios.items() if bool(s.width) == bool(setting.width)]
        return self._base(setting) * (statistics.median(kind) if kind else 1.0)

    @property
    def is_shunned(self) -> bool:
        """Whether rounds have passed and none of them, of late, had a draft that was timed."""
        return self._now > 0 and not self._ratios()

    def least(self) -> dict[Setting, float]:
        """Seconds of all settings that were measured or drafted, at their best.

        What else runs only ever makes a draft take longer, and one that looks too dear is not
        made, so nobody would find out. One that looks too cheap is, and then it is known.
        """
        tried = {*self.measured, *self._ratios()}
        return {s: min(self.of(s), self.measured.get(s, np.inf)) for s in tried}

    def _ratios(self) -> dict[Setting, float]:
        """How far drafts of late were off what was measured before."""
        return {
            setting: recent.value
            for setting, recent in self._recent.items()
            if recent.value is not None and self._now - recent.seen_at < LiveCosts.FORGET
        }

    def _base(self, setting: Setting) -> float:
        """Seconds if measured, else what those that were say."""
        if setting in self.measured:
            return self.measured[setting]
        return (
            max(float(self._parts @ self._work(setting)), SHORTEST) if setting.width else SHORTEST
        )

    def _fit(self) -> np.ndarray:
        """(3,) seconds of a search, of each of its steps, of each beam of a step."""
        searches = {s: seconds for s, seconds in self.measured.items() if s.width}
        if not searches:
            return np.zeros(3)
        work = np.array([self._work(s) for s in searches], float)
        return np.linalg.lstsq(work, np.array(list(searches.values())), rcond=None)[0]

    @staticmethod
    def _work(setting: Setting) -> tuple[int, int, int]:
        steps = setting.length - 1
        return 1, steps, steps * setting.width
