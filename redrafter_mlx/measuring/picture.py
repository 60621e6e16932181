"""The picture of a measured profile: what rows cost, and the speedup that budgets would give."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from redrafter_mlx.pricing.curve import CostCurve

_log = logging.getLogger("redrafter_mlx")


def new_figure(*size: float):
    """A matplotlib figure; None, with a message, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    return Figure(figsize=size, layout="constrained")


def draw(curve: CostCurve, speedups: Mapping[int, Sequence[float]], path: Path, title: str) -> bool:
    """Draw a PNG: cost by rows, and expected speedup by budget; False without matplotlib.

    speedups  context length -> (N + 1,) expected speedup over plain decoding by budget
    Raises OSError when the file cannot be written.
    """
    figure = new_figure(10, 4)
    if figure is None:
        return False
    left, right = figure.subplots(1, 2)
    for context, seconds in zip(curve.contexts, curve.seconds, strict=True):
        left.plot(curve.rows, np.divide(seconds, seconds[0]), marker=".", label=f"{context} tokens")
    left.set_xlabel("rows of a pass")
    left.set_ylabel("cost, in rounds of plain decoding")
    left.set_ylim(bottom=0)
    for context, values in speedups.items():
        right.plot(range(2, len(values)), values[2:], label=f"{context} tokens")
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_xlabel("budget (nodes of the tree)")
    right.set_ylabel("expected speedup, draft included")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title="context")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True
