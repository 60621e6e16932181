"""Recurrences over the rows of a tree: each row goes on from its parent's state.

A recurrence that is linear in its state can be unrolled along a path: what row i reads is a sum
over its ancestors. With S the sums of log-decays along paths, row i sees what its ancestor j added
decayed by exp(S_i - S_j), and the text's state decayed by exp(S_i). So a whole tree is a few matrix
products with the ancestors' mask, as the chunks of a prompt are with the causal one (for the delta
rule: Yang et al., arXiv 2406.06484; for Mamba-2: Dao and Gu, arXiv 2405.21060), and the state after
a row is one more product. No state is stored per row or path. Other recurrences run level by level.

Each function returns what mlx-lm's own gives for the rows, and `after`: row -> state after it.

Shape letters: B batch (1), N rows, H heads, D size of a head, S size of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from redrafter_mlx.target.lineage import Lineage

After = Callable[[int], mx.array]
LEAST = 1e-37
"""Smaller decays are raised to this: all is forgotten, and the logarithm is finite."""


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array,
    lineage: Lineage,
) -> tuple[mx.array, After]:  # fmt: skip
    """The gated delta rule: state = g state; state += beta (v - state k) k'; y = state q.

    q, k (B, N, Hk, Dk), v (B, N, H, Dv), g (B, N, H) or (B, N, H, Dk), beta (B, N, H),
    state (B, H, Dv, Dk), as of mlx_lm.models.gated_delta. Returns y (B, N, H, Dv).
    """
    dtype, group = v.dtype, v.shape[2] // q.shape[2]
    q, k = (mx.repeat(x[0], group, axis=1) if group > 1 else x[0] for x in (q, k))
    q, k, v, beta = (x.swapaxes(0, 1).astype(mx.float32) for x in (q, k, v[0], beta[0, ..., None]))
    start, decay = _decays(mx.log(mx.maximum(g[0].astype(mx.float32), LEAST)), lineage)
    if g.ndim == 4:  # a decay for each channel of the key
        likeness = lambda x: (x[:, :, None] * decay * k[:, None]).sum(axis=-1)
    else:
        likeness = lambda x: (x @ k.swapaxes(1, 2)) * decay
    held = state[0].astype(mx.float32)  # (H, Dv, Dk)
    wanted = (v - (k * start) @ held.swapaxes(1, 2)) * beta
    added = _by_substitution(wanted, likeness(k) * beta, lineage)
    y = (q * start) @ held.swapaxes(1, 2) + likeness(q) @ added

    def after(row: int) -> mx.array:
        left = decay[:, row] if g.ndim == 4 else decay[:, row, :, None]
        rest = held * start[:, row, None]
        return mx.addmm(rest, added.swapaxes(1, 2), k * left)[None].astype(state.dtype)

    return y.swapaxes(0, 1)[None].astype(dtype), after


def _by_substitution(wanted: mx.array, likeness: mx.array, lineage: Lineage) -> mx.array:
    """x (H, N, D) with x_i = wanted_i - sum of likeness_ij x_j over i's ancestors j."""
    if lineage.order is not None:
        wanted = wanted[:, lineage.order]
        likeness = likeness[:, lineage.order][:, :, lineage.order]
    found: mx.array | None = None
    for level in lineage.levels:
        here = wanted[:, level]
        if found is None:
            found = here
        else:
            here = here - likeness[:, level, : level.start] @ found
            found = mx.concatenate([found, here], axis=1)
    return found if lineage.order is None else found[:, lineage.inverse]


def decayed_sum(
    reads: mx.array, keys: mx.array, values: mx.array, log_decay: mx.array, state: mx.array,
    lineage: Lineage,
) -> tuple[mx.array, After]:  # fmt: skip
    """Linear attention: state = exp(log_decay) state + value key'; y = state read.

    reads, keys (H, N, S), values (H, N, D), log_decay (N, H), state (H, D, S).
    Returns y (H, N, D), and the state (H, D, S) after a row.
    """
    start, decay = _decays(log_decay, lineage)
    y = (reads * start) @ state.swapaxes(1, 2)
    y = y + ((reads @ keys.swapaxes(1, 2)) * decay) @ values

    def after(row: int) -> mx.array:
        left = decay[:, row, :, None]
        return mx.addmm(state * start[:, row, None], (values * left).swapaxes(1, 2), keys)

    return y, after


def decayed_rows(
    x: mx.array, a: mx.array, state: mx.array, lineage: Lineage
) -> tuple[mx.array, After]:
    """A separate recurrence per channel: y = a y + x; x, a (N, D), state (D,); y (N, D)."""
    start, decay = _decays(mx.log(mx.maximum(a.astype(mx.float32), LEAST))[:, None], lineage)
    y = (decay[0] * x).sum(axis=1) + start[0] * state
    y = y.astype(x.dtype)
    return y, lambda row: y[row]


def _decays(log_decay: mx.array, lineage: Lineage) -> tuple[mx.array, mx.array]:
    """Decays of the text's state at each row, and of what each row added at each other one.

    log_decay  (N, H) or (N, H, D)

    Returns (H, N, 1 or D), and (H, N, N) or (H, N, N, D), 0 where j is not an ancestor of i.
    """
    log_decay = log_decay.swapaxes(0, 1)
    rows = log_decay if log_decay.ndim == 3 else log_decay[..., None]  # (H, N, D)
    total = lineage.ancestors @ rows
    between = mx.minimum(total[:, :, None] - total[:, None], 0.0)
    decay = mx.where(lineage.visible[..., None], mx.exp(between), 0.0)
    return mx.exp(total), decay if log_decay.ndim == 3 else decay[..., 0]


def by_levels(
    step: Callable[..., tuple[mx.array, mx.array]],
    rows: Sequence[mx.array],
    state: mx.array | None,
    lineage: Lineage,
) -> tuple[mx.array, After]:
    """Any recurrence, level by level through the tree, the rows of a level as a batch.

    step   (a row of each input (B, 1, ...), state (B, ...) or None) -> (y, new state)
    rows   the inputs, each (1, N, ...)
    state  (1, ...) before the pass

    Returns y (1, N, ...). The state of every row is kept until the pass is forgotten.
    """
    if lineage.order is not None:
        rows = [x[:, lineage.order] for x in rows]
    outputs, states = [], []
    for level, continued in zip(lineage.levels, lineage.continued, strict=True):
        before = states[-1] if states else state
        if continued is not None:
            before = before[continued]
        y, new = step(*(x[0, level][:, None] for x in rows), before)
        outputs.append(y)
        states.append(new)
    y = mx.concatenate(outputs).swapaxes(0, 1)

    def after(row: int) -> mx.array:
        level, place = lineage.place(row)
        return states[level][place : place + 1]

    return y if lineage.order is None else y[:, lineage.inverse], after
