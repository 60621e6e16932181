"""Recurrences along a tree give each row what mlx-lm's own give at the end of its path."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta, ssm

from redrafter_mlx.target.lineage import Lineage
from redrafter_mlx.target.recurrence import by_levels, decayed_rows, decayed_sum, delta_rule

TREES = {
    "one row": [-1],
    "a chain": [-1, 0, 1, 2, 3, 4, 5],
    "a bush": [-1, 0, 1, 1, 0, 4, 4, 6, 0],
    "a long tree": [-1, *range(11), 3, 12, 13, 0, 15],
}


@pytest.fixture(params=TREES.values(), ids=TREES.keys())
def lineage(request):
    return Lineage(np.array(request.param))


def path(lineage, row):
    rows = []
    while row >= 0:
        rows.append(int(row))
        row = lineage.parents[row]
    return rows[::-1]


def normal(rng, *shape):
    return mx.array(rng.normal(size=shape).astype(np.float32))


def check(lineage, y, after, alone, axis=1):
    """`alone` makes a path's rows alone: (y, state)."""
    for row in range(len(lineage)):
        rows = mx.array(path(lineage, row))
        expected, state = alone(rows)
        here = mx.take(y, mx.array([row]), axis=axis)
        last = mx.take(expected, mx.array([len(rows) - 1]), axis=axis)
        np.testing.assert_allclose(here, last, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(after(row), state, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("strongest", [0.02, 30.0])
def test_the_delta_rule(lineage, by_channel, strongest):
    rng, n = np.random.default_rng(0), len(lineage)
    q, k = gated_delta.normalize_qk(
        normal(rng, 1, n, 2, 32), normal(rng, 1, n, 2, 32), inv_scale=32**-0.5, eps=1e-6
    )
    v, state = normal(rng, 1, n, 4, 8), normal(rng, 1, 4, 8, 32)
    g = mx.array(rng.uniform(0, strongest, (1, n, 4, 32) if by_channel else (1, n, 4)))
    g, beta = mx.exp(-g.astype(mx.float32)), mx.sigmoid(normal(rng, 1, n, 4)) * 2
    y, after = delta_rule(q, k, v, g, beta, state, lineage)
    given = (q, k, v, g, beta)
    alone = lambda rows: gated_delta.gated_delta_ops(*(x[:, rows] for x in given), state)
    check(lineage, y, after, alone)


def test_equal_keys_lose_no_digits():
    """As text that repeats itself has them: a product of powers would be off by a thousandth."""
    n = 64
    k = mx.broadcast_to(mx.eye(32)[0], (1, n, 1, 32))
    v, state = mx.ones((1, n, 1, 4)), mx.zeros((1, 1, 4, 32))
    given = (k, k, v, mx.full((1, n, 1), 0.999), mx.full((1, n, 1), 1.9))
    y, after = delta_rule(*given, state, Lineage.chain(n))
    expected, last = gated_delta.gated_delta_ops(*given, state)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(after(n - 1), last, atol=1e-5)


def test_linear_attention_as_mamba_2_has_it(lineage):
    rng, n = np.random.default_rng(0), len(lineage)
    x, B, C = normal(rng, 1, n, 4, 8), normal(rng, 1, n, 2, 16), normal(rng, 1, n, 2, 16)
    dt, state = mx.abs(normal(rng, 1, n, 4)), normal(rng, 1, 4, 8, 16)
    A_log, zero = mx.log(mx.arange(1, 5, dtype=mx.float32)), mx.zeros(4)

    def alone(rows):
        fixed = (A_log, B[:, rows], C[:, rows], zero, dt[:, rows], zero)
        return ssm.ssm_attn(x[:, rows], *fixed, state, time_step_limit=(0.0, 100.0))

    heads = lambda y: mx.repeat(y[0].swapaxes(0, 1), 2, axis=0)
    used = ssm.compute_dt(dt, zero, (0.0, 100.0))[0]
    y, after = decayed_sum(
        heads(C), heads(B), (used[..., None] * x[0]).swapaxes(0, 1), -used * mx.exp(A_log),
        state[0], lineage,
    )  # fmt: skip
    check(lineage, y.swapaxes(0, 1)[None], lambda row: after(row)[None], alone)


def test_a_decay_for_each_channel(lineage):
    rng, n = np.random.default_rng(0), len(lineage)
    x, state = normal(rng, n, 6), normal(rng, 6)
    a = mx.array(rng.uniform(0, 1, (n, 6)).astype(np.float32) ** 8)

    def alone(rows):
        h, ys = state, []
        for row in rows.tolist():
            h = a[row] * h + x[row]
            ys.append(h)
        return mx.stack(ys)[None], h

    y, after = decayed_rows(x, a, state, lineage)
    check(lineage, y[None], after, alone)


def test_level_by_level(lineage):
    rng, n = np.random.default_rng(0), len(lineage)
    x, state = normal(rng, 1, n, 3), normal(rng, 1, 3)
    calls = []

    def step(rows, before):
        calls.append(len(rows))
        new = mx.tanh(before + rows[:, 0])
        return 2 * new[:, None], new

    def alone(rows):
        h, ys = state, []
        for row in rows.tolist():
            h = mx.tanh(h + x[:, row])
            ys.append(2 * h)
        return mx.stack(ys, axis=1), h

    y, after = by_levels(step, [x], state, lineage)
    assert sum(calls) == n
    assert len(calls) == len(lineage.levels)
    check(lineage, y, after, alone)


def test_windows_hold_what_came_before_on_the_path():
    lineage = Lineage(np.array([-1, 0, 1, 0, 3]))  # rows 3 and 4 do not follow 1 and 2
    assert lineage.windows(3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [1, 2, 5], [2, 5, 6]]
    assert Lineage.chain(3).windows(2).tolist() == [[0, 1], [1, 2], [2, 3]]
