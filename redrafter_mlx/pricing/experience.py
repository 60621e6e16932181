"""What is known of a drafter's drafts: how often they were accepted, and some of them as samples.

A head brings it in its directory (`experience.json`); a profile keeps what this machine has seen.

Shape letters: K depths, M candidates.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.policy import Policy, Samples
from redrafter_mlx.rounds.tree import Candidates

_log = logging.getLogger("redrafter_mlx")

FILE = "experience.json"
FORMAT = 1
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
            RecursionError)  # fmt: skip
"""What reading a JSON file of somebody else's making may raise."""


@dataclass(frozen=True)
class Experience:
    """Of one search at one temperature.

    full     the widest and longest search
    predicted, accepted  (2, K, BINS) sums, as Calibration holds them
    samples  drafts of the full search: parents (M,) and log-probabilities (M,) of their nodes, but
             no tokens, so that nothing of a text is kept
    """

    full: Setting
    predicted: np.ndarray
    accepted: np.ndarray
    samples: list[Candidates] = field(default_factory=list)

    @classmethod
    def of(cls, policy: Policy) -> Experience:
        """What a policy knows now."""
        c = policy.calibration
        return cls(
            policy.full, c.predicted.copy(), c.accepted.copy(), list(policy.samples.candidates)
        )

    def calibration(self) -> Calibration:
        return Calibration(self.full.length - 1, self.predicted, self.accepted)

    def within(self, full: Setting) -> Experience:
        """As another search, narrower, shorter or longer, can use it."""
        if full == self.full:
            return self
        rows = np.minimum(np.arange(full.length - 1), self.full.length - 2)
        return Experience(full, self.predicted[:, rows], self.accepted[:, rows])

    def at_another_temperature(self) -> Experience:
        """With no more weight than a prior: acceptance depends on temperature."""
        known = self.calibration()
        known.doubt()
        return Experience(self.full, known.predicted, known.accepted, self.samples)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rounded = lambda x, digits: np.round(x, digits).tolist()
        return {
            "full": list(self.full),
            "predicted": rounded(self.predicted, 4),
            "accepted": rounded(self.accepted, 4),
            "samples": [[c.parents.tolist(), rounded(c.logprobs, 3)] for c in self.samples],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Experience:
        """What `as_dict` made; ValueError, KeyError, TypeError or IndexError if it did not."""
        width, length = content["full"]
        full = Setting(int(width), int(length))
        tables = Calibration(full.length - 1, content["predicted"], content["accepted"])
        if not np.isfinite([tables.predicted, tables.accepted]).all():
            raise ValueError("its sums are not finite")
        samples = [_sample(*sample) for sample in content["samples"]][-Samples.MOST :]
        return cls(full, tables.predicted, tables.accepted, samples)


def _sample(tree: Sequence[int], scores: Sequence[float]) -> Candidates:
    parents, logprobs = np.array(tree, int), np.array(scores, float)
    if parents.shape != logprobs.shape or parents.ndim != 1:
        raise ValueError("a sample has unequal numbers of parents and log-probabilities")
    if not (np.isfinite(logprobs) & (logprobs <= 0)).all():
        raise ValueError("a sample has a log-probability that is not finite and at most 0")
    if not ((parents >= -1) & (parents < np.arange(len(parents)))).all():
        raise ValueError("a sample has a node before its parent")
    return Candidates(0, np.zeros(len(parents), int), parents, logprobs, np.zeros(0, int))


def as_text(experiences: dict[float, Experience]) -> str:
    """The text of `experience.json`: what is known, by temperature."""
    content = {"format": FORMAT, "by_temperature": {
        f"{temp:g}": each.as_dict() for temp, each in sorted(experiences.items())
    }}  # fmt: skip
    return json.dumps(content, separators=(",", ":")) + "\n"


def read(directory: Path) -> dict[float, Experience]:
    """By temperature, what a head's directory says; empty, with a warning, if it cannot be used."""
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads {FORMAT}")
        found = content["by_temperature"].items()
        return {float(temp): Experience.from_dict(each) for temp, each in found}
    except FileNotFoundError:
        return {}
    except UNUSABLE as error:
        _log.warning("%s is ignored: %s", path, one_line(error))
        return {}
