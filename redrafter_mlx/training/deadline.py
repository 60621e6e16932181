"""How --minutes is kept: every stage knows the moment by which it must be done.

Moments rather than durations: time lost to an earlier stage, a slow start or a pause is then taken
from the stages after it, and the end does not move.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

SHARES = {"data": 0.4, "training": 0.52, "report": 0.08}
"""Of --minutes, in the order of the stages; what one does not need, the next one gets."""


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.monotonic`, which all processes of a machine share; by default none."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment that is so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def bounded(self) -> bool:
        """Whether it ever comes."""
        return self.at < math.inf

    @property
    def left(self) -> float:
        """Seconds until then; negative when it has passed."""
        return self.at - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.left <= 0


NEVER = Deadline()


class Budget:
    """The time of a whole run, and how it was spent.

    minutes  for everything; None: as long as it takes
    """

    def __init__(self, minutes: float | None):
        self._began = self._noted = time.monotonic()
        self.minutes = minutes
        self._spent: dict[str, float] = {}

    @property
    def end(self) -> Deadline:
        """By when everything must be done."""
        return self.by("report")

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def by(self, stage: str) -> Deadline:
        """By when a stage must be done."""
        if self.minutes is None:
            return NEVER
        names = list(SHARES)
        share = sum(SHARES[name] for name in names[: names.index(stage) + 1])
        return Deadline(self._began + 60 * share * self.minutes)

    def seconds(self, stage: str) -> float:
        """What a stage may take; 0 without --minutes."""
        return 60 * SHARES[stage] * (self.minutes or 0.0)

    def note(self, stage: str) -> None:
        """Count all time since the last note as spent on this stage."""
        now = time.monotonic()
        self._spent[stage] = self._spent.get(stage, 0.0) + now - self._noted
        self._noted = now

    def __str__(self) -> str:
        """For the report: how the time was spent, and whether it was enough."""
        total = sum(self._spent.values())
        parts = ", ".join(
            f"{stage} {seconds / 60:.1f} ({seconds / max(total, 1e-9):.0%})"
            for stage, seconds in self._spent.items()
        )
        told = f"Minutes: {total / 60:.1f}"
        if self.minutes is not None:
            told += f" of --minutes {self.minutes:g}"
        told += f": {parts}."
        if self.minutes is not None and total > 66 * self.minutes:
            told += " It was too short for the least that has to be done; --dry-run tells how long."
        return told
