"""The picture of a training run: loss, and tokens per round, over time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger("redrafter_mlx")


def draw(log: Sequence[dict], path: Path, title: str) -> bool:
    """Draw the entries of a run's log.jsonl as PNG; False, with a message, without matplotlib.

    Entries have `seconds`, and `loss` or `tree` and `chain` (tokens per round), or both.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names, label in (
        (left, ("loss",), "loss"),
        (right, ("tree", "chain"), "tokens per round, held out"),
    ):
        for name in names:
            points = [(entry["seconds"] / 60, entry[name]) for entry in log if name in entry]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="." if name != "loss" else ""
                )
        axes.set_xlabel("minutes of training")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if right.lines:
        right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True
