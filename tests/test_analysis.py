"""EWIF and SWI: against simulation, and against what the literature and measurements say."""

import numpy as np
import pytest

from benchmarks.analysis import (
    acceptance,
    break_even,
    curve,
    ewif_horizontal,
    ewif_speculative,
    ewif_vertical,
    phi,
    swi,
    tokens_per_round,
)
from redrafter_mlx.rounds.stats import Stats

ROUNDS = 10_000_000
THREE_DECIMALS = 1e-3

CPU = curve({1: 61, 2: 77, 4: 88, 8: 104, 16: 110, 24: 144, 32: 162, 48: 225})
"""Milliseconds of a pass of the demo target on two cores, at a context of 181 tokens."""


def constant(rows):
    return 1.0


def run_lengths(rng, alpha, most):
    """How many of `most` (an array or a number) drafted tokens are accepted in a row."""
    return np.minimum(rng.geometric(1 - alpha, size=ROUNDS) - 1, most)


@pytest.mark.parametrize(("alpha", "c", "k"), [(0.6, 0.05, 5), (0.5, 0.2, 3), (0.3, 0.02, 8)])
def test_speculative_decoding_as_simulated(alpha, c, k):
    tokens = 1 + run_lengths(np.random.default_rng(k), alpha, k)
    for cost in (constant, CPU):
        simulated = tokens.mean() / (k * c + cost(k + 1))
        assert abs(ewif_speculative(alpha, c, k, cost) - simulated) < THREE_DECIMALS


@pytest.mark.parametrize(("alpha", "inner", "n", "k"), [(0.6, 0.4, 2, 5), (0.5, 0.6, 3, 2)])
def test_a_vertical_cascade_as_simulated(alpha, inner, n, k):
    rng = np.random.default_rng(n)
    drafted = sum(1 + run_lengths(rng, inner, k) for _ in range(n))
    tokens = 1 + run_lengths(rng, alpha, drafted)
    for cost in (constant, CPU):
        review = np.array([cost(rows) for rows in range(1, n * (k + 1) + 2)])[drafted]
        spent = review.mean() + n * 0.1 * CPU(k + 1) + n * k * 0.01
        formula = ewif_vertical(alpha, inner, n, k, 0.1, 0.01, cost, outer_cost=CPU)
        assert abs(formula - tokens.mean() / spent) < THREE_DECIMALS


def test_a_horizontal_cascade_as_simulated():
    alphas, costs = [0.8, 0.7, 0.4, 0.3], [0.1, 0.1, 0.01, 0.01]
    accepted = np.random.default_rng(0).random((ROUNDS, 4)) < alphas
    tokens = 1 + np.logical_and.accumulate(accepted, axis=1).sum(axis=1)
    for cost in (constant, CPU):
        simulated = tokens.mean() / (cost(5) + sum(costs))
        assert abs(ewif_horizontal(alphas, costs, cost) - simulated) < THREE_DECIMALS


@pytest.mark.parametrize(("alpha", "inner", "n", "k"), [(0.7, 0.4, 2, 5), (0.9, 0.2, 4, 10)])
def test_the_vertical_cascade_is_the_papers_closed_form(alpha, inner, n, k):
    drafts = (1 - alpha) * (1 + n * 0.1 + n * k * 0.01)
    closed = (1 - alpha * phi(alpha, inner, k) ** n) / drafts
    assert ewif_vertical(alpha, inner, n, k, 0.1, 0.01) == pytest.approx(closed, rel=1e-12)


def test_phi_generates_the_tokens_of_a_round():
    lengths = 1 + run_lengths(np.random.default_rng(1), 0.6, 4)
    assert phi(0.8, 0.6, 4) == pytest.approx((0.8**lengths).mean(), abs=THREE_DECIMALS)


def test_cascades_of_one_kind_are_speculative_decoding():
    plain = ewif_speculative(0.7, 0.1, 4)
    assert ewif_horizontal([0.7] * 4, [0.1] * 4) == pytest.approx(plain)
    assert ewif_vertical(0.7, 0.0, 4, 0, 0.1, 0.0) == pytest.approx(plain)
    assert tokens_per_round(1.0, 4) == 5
    with pytest.raises(ValueError, match="2 acceptance rates but 1 costs"):
        ewif_horizontal([0.7, 0.6], [0.1])


def test_a_published_comparison():
    """Vicuna-7B with a 68M draft model on GSM8K: 44.3 of 33.3 tokens/s plain; a cascade 56.7.

    By the formula a horizontal cascade gains over its first drafter alone as they report (1.28
    times), for one acceptance rate: what is added costs nothing.
    """
    alone = lambda a: ewif_speculative(a, 0.01, 5)
    longer = lambda a: ewif_horizontal([a] * 15, [0.01] * 5 + [0.0] * 10)
    rates = np.linspace(0.1, 0.95, 400)
    gains = np.array([longer(a) / alone(a) for a in rates])
    assert (np.diff(gains) > 0).all()
    assert gains[0] < 56.7 / 44.3 < gains[-1]


def test_a_measured_break_even():
    """16 rows cost 110 ms and one 61: a round must yield more than 1.8 tokens."""
    assert round(break_even(16, CPU), 1) == 1.8
    assert break_even(16, CPU, draft=0.2) == pytest.approx(110 / 61 + 0.2)
    assert break_even(16, constant) == 1


def test_the_constant_cost_assumption_misleads():
    """Long drafts look better than short ones by the formula, and are worse on a real curve."""
    assert ewif_speculative(0.5, 0.01, 7) > ewif_speculative(0.5, 0.01, 3)
    assert ewif_speculative(0.5, 0.01, 7, CPU) < ewif_speculative(0.5, 0.01, 3, CPU)


def test_the_curve_goes_through_what_was_measured():
    assert [CPU(n) for n in (1, 8, 16)] == [1, 104 / 61, 110 / 61]
    assert CPU(12) == pytest.approx(107 / 61)
    assert CPU(64) == pytest.approx((225 + 63) / 61)
    with pytest.raises(ValueError, match="1 row"):
        curve({4: 1.0, 8: 2.0})


def test_swi_and_acceptance_of_a_recorded_run():
    stats = Stats(tokens=40, rounds=20, accepted_at=[12, 6, 2])
    assert acceptance(stats) == [0.6, 0.5, pytest.approx(1 / 3)]
    assert swi(stats.tokens, stats.rounds) == 2.0
    assert swi(stats.tokens, stats.rounds, [(60, 0.1), (200, 0.0)]) == pytest.approx(40 / 26)
