"""Cost curves: lines between measurements, corrections by what rounds really cost."""

import numpy as np
import pytest

from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Recent, Setting

CURVE = CostCurve([100, 200], [1, 2, 4], [[1.0, 2.0, 3.0], [1.0, 4.0, 8.0]])


def test_between_measurements_lines_are_drawn():
    np.testing.assert_allclose(CURVE.at(100, 4), [0, 1, 2, 2.5, 3])
    np.testing.assert_allclose(CURVE.at(150, 4), [0, 1, 3, 4.25, 5.5])


def test_before_the_first_and_beyond_the_last():
    np.testing.assert_allclose(CURVE.at(0, 2), CURVE.at(100, 2))
    np.testing.assert_allclose(CURVE.at(300, 4), [0, 1, 6, 9.5, 13])
    np.testing.assert_allclose(CURVE.at(100, 8)[4:], [3, 3.5, 4, 4.5, 5])
    falling = CostCurve([1], [1, 8, 16], [[1.0, 3.0, 2.0]])
    np.testing.assert_allclose(falling.at(1, 20)[16:], 2.0)


def test_one_row_is_enough():
    np.testing.assert_allclose(CostCurve([5], [1], [[2.0]]).at(9, 3)[1:], 2.0)


@pytest.mark.parametrize(
    ("contexts", "rows", "seconds"),
    [
        ([], [], []),
        ([1], [1, 2], [[1.0]]),
        ([1], [1, 2], [[1.0, -1.0]]),
        ([1], [1, 2], [[1.0, float("nan")]]),
        ([1], [2, 1], [[1.0, 1.0]]),
        ([1], [2, 3], [[1.0, 1.0]]),
        ([2, 1], [1], [[1.0], [1.0]]),
        ([1], [1, 2.5], [[1.0, 1.0]]),
        ([-1], [1], [[1.0]]),
    ],
)
def test_what_is_no_curve_is_refused(contexts, rows, seconds):
    with pytest.raises(ValueError, match="cost curve"):
        CostCurve(contexts, rows, seconds)


def test_a_first_measurement_alone_is_none():
    """It may have compiled kernels."""
    recent = Recent()
    assert recent.value is None
    recent.add(9.0, 0)
    assert recent.value is None
    recent.add(1.0, 1)
    assert recent.value == 1.0
    for value in (1.2, 1.1, 50.0, 1.0, 1.3):
        recent.add(value, 2)
    assert recent.value == 1.2


def test_a_curve_is_corrected_by_what_rounds_cost():
    costs = LiveCosts(CURVE)
    np.testing.assert_allclose(costs.at(100, 4), CURVE.at(100, 4))
    for _ in range(3):
        costs.observe(4, 100, 4.5)
    np.testing.assert_allclose(costs.at(100, 4)[1:], 1.5 * CURVE.at(100, 4)[1:])
    for _ in range(5):
        costs.observe(1, 100, 1.0)
        costs.observe(4, 100, 4.5)
    one, four = costs.at(100, 4)[[1, 4]]
    assert 1.0 < one < 1.25 < 4.5 - 0.75 < four < 4.5, "most of a difference is taken for noise"


def test_noise_of_single_sizes_hardly_shows():
    rng = np.random.default_rng(0)
    costs, true = LiveCosts(CURVE), CURVE.at(100, 4)
    for _ in range(100):
        rows = int(rng.integers(1, 5))
        costs.observe(rows, 100, true[rows] * (1 + 0.05 * rng.standard_normal()))
    np.testing.assert_allclose(costs.at(100, 4)[1:], true[1:], rtol=0.03)


def test_old_measurements_are_forgotten():
    costs = LiveCosts(CURVE)
    for _ in range(3):
        costs.observe(4, 100, 30.0)
    for _ in range(LiveCosts.FORGET):
        costs.observe(2, 100, 2.0)
    np.testing.assert_allclose(costs.at(100, 4), CURVE.at(100, 4))


def test_several_rows_cost_no_less_than_one():
    curve = CostCurve([100], [1, 2, 4], [[1.0, 1.1, 2.0]])
    costs = LiveCosts(curve)
    for _ in range(5):
        costs.observe(1, 100, 1.5)  # the machine was slow
    for _ in range(20):
        costs.observe(2, 100, 1.1)
    one, two, four = costs.at(100, 4)[[1, 2, 4]]
    assert 1 < one == two < four


def test_after_a_pause_only_new_measurements_count():
    recent = Recent()
    for now in range(5):
        recent.add(9.0, now)
    for now in range(2):
        recent.add(1.0 + now, Recent.STALE + 10 + now)
    assert recent.value == 1.0


def test_draft_costs_are_corrected_together_and_then_each():
    costs = LiveDraftCosts({Setting(1, 2): 1.0, Setting(4, 5): 8.0})
    assert costs.of(Setting(4, 5)) == 8.0
    for _ in range(2):
        costs.observe(Setting(4, 5), 16.0)
    assert costs.of(Setting(1, 2)) == 2.0
    for _ in range(2):
        costs.observe(Setting(1, 2), 1.5)
    assert costs.of(Setting(1, 2)) == 1.5


def test_drafts_that_were_not_measured_follow_from_those_that_were():
    """Something once, something for each step, something for each beam of a step."""
    true = lambda width, length: 2 + (length - 1) * (1 + 0.5 * width)
    costs = LiveDraftCosts({Setting(*s): true(*s) for s in ((4, 5), (1, 5), (1, 2))})
    assert costs.of(Setting(2, 3)) == pytest.approx(true(2, 3))
    for _ in range(2):
        costs.observe(Setting(2, 3), 2 * true(2, 3))
    assert costs.of(Setting(2, 3)) == pytest.approx(2 * true(2, 3))
    assert costs.of(Setting(4, 5)) == pytest.approx(2 * true(4, 5)), "the machine got slower"
    assert costs.least().keys() == {*costs.measured, Setting(2, 3)}


def test_what_needs_no_search_is_priced_apart():
    costs = LiveDraftCosts({Setting(0, 5): 0.01, Setting(4, 5): 2.0})
    for _ in range(2):
        costs.observe(Setting(0, 5), 0.05)
    assert costs.of(Setting(4, 5)) == 2.0
    assert costs.of(Setting(0, 5)) == pytest.approx(0.05)


def test_nothing_measured_costs_nothing():
    assert LiveDraftCosts().of(Setting(4, 5)) == 0.0


def test_a_curve_takes_in_another_context():
    longer = CURVE.with_context(5000, {1: 3.0, 4: 9.0})
    assert longer.contexts[-1] == 5000
    assert longer.at(5000, 4)[[1, 4]].tolist() == [3.0, 9.0]
    np.testing.assert_allclose(longer.at(100, 4), CURVE.at(100, 4))
    again = longer.with_context(5000, {1: 6.0, 4: 18.0})
    assert again.contexts == longer.contexts
    assert again.at(5000, 4)[1] == 6.0
