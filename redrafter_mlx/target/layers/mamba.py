"""Mamba-1 (mamba, falcon_mamba, jamba): its steps run level by level.

Unrolled, a decay for each channel and each part of its state would be N x N x 16 numbers per
channel; the states themselves are small.
"""

from __future__ import annotations

from redrafter_mlx.target.recurrence import by_levels
from redrafter_mlx.target.state import reading


def _one_step(stock, self, x, A, state=None):
    """Called by the layer row by row: x (1, D), state (1, D, S)."""
    return reading().keep_step(lambda before: stock(self, x, A, before), state)


def _all_steps(stock, self, x, A, state=None):
    """x (1, N, D), state (1, D, S)."""
    cache = reading()
    step = lambda row, before: stock(self, row, A, before)
    y, after = by_levels(step, [x], state, cache.lineage)
    return y, cache.keep_state(after(x.shape[1] - 1), after)


FUNCTIONS = {}
_TAKES = ("self", "x", "A", "state")
METHODS = {
    "mlx_lm.models.mamba.MambaBlock": {"ssm_step": (_one_step, _TAKES)},
    "mlx_lm.models.jamba.JambaMambaMixer": {"ssm_step": (_all_steps, _TAKES)},
}
