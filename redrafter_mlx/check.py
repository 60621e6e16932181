"""Does a run say what plain decoding says? Replays it and finds the first difference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from redrafter_mlx.generation import Generation, Token
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.sampling import Sampler


@dataclass(frozen=True)
class Comparison:
    """A run against plain decoding of the same prompt.

    tokens      of the run
    position    in the generated text, of the first difference; None if there is none
    drafted, plain  the two token ids there; None where one text had ended
    margin      by how much the plain token leads the other in the one-row logits; infinite if
                the sampling filters had removed the other
    """

    tokens: int
    position: int | None = None
    drafted: int | None = None
    plain: int | None = None
    margin: float | None = None

    @property
    def identical(self) -> bool:
        return self.position is None

    def as_dict(self) -> dict:
        """Everything, for JSON, which knows no infinity."""
        finite = self.margin is None or math.isfinite(self.margin)
        return {
            "identical": self.identical,
            **dataclasses.asdict(self),
            "margin": self.margin if finite else None,
        }

    def __str__(self) -> str:
        if self.identical:
            return f"identical ({self.tokens} tokens)"
        margin = "" if self.margin is None else f", one-row logit margin {self.margin:.3g}"
        return (
            f"differs at generated token {self.position}: {self.drafted} with the drafter, "
            f"{self.plain} without{margin}"
        )


def compare_with_plain(tokens: Sequence[int], plain: Generation) -> Comparison:
    """Replay `plain`, a run without a drafter but with the same seed, beside `tokens`.

    The replay stops at the first difference, or as soon as it is as long as `tokens`.
    """
    replayed = 0
    for replayed, (token, reference) in enumerate(zip(tokens, plain, strict=False), start=1):
        if token != reference.id:
            history = [*plain.prompt, *tokens[: replayed - 1]]
            margin = _margin(plain.sampler, reference, token, history)
            return Comparison(len(tokens), replayed - 1, token, reference.id, margin)
    if replayed < len(tokens):
        return Comparison(len(tokens), replayed, tokens[replayed], None)
    return Comparison(len(tokens))


def _margin(sampler: Sampler, reference: Token, other: int, history: Sequence[int]) -> float:
    """Lead of the chosen token over `other`, noise included; infinite if the filters removed it."""
    (logits,) = device.read(reference.logits.astype(mx.float32))
    ids, scores = sampler.scores(logits, len(history), history)
    others = scores[ids == other]
    return float(np.max(scores) - others[0]) if len(others) else float("inf")
