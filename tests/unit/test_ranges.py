"""Histograms that grow, and the ranges that methods find in them, against numbers worked out by hand or by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.measuring import measure
from calibration.ranges import BINS, Histogram, RangeMethod, find_range
from fcos_deploy.core.errors import CalibrationError


def filled(*arrays: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for values in arrays:
        histogram.add(measure(values, samples=values.size))
    return histogram


def test_counts_equal_numpys_histogram() -> None:
    values = np.random.default_rng(0).normal(0, 3, 20_000).astype(np.float32)
    histogram = filled(values)
    reach = BINS * histogram.width
    assert np.array_equal(histogram.positive, np.histogram(values[values > 0], BINS, (0, reach))[0])
    assert np.array_equal(histogram.negative, np.histogram(-values[values < 0], BINS, (0, reach))[0])


def test_order_of_values_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(0, scale, 1000).astype(np.float32) for scale in (0.01, 40.0, 1.0, 7.0)]
    one, other = filled(*parts), filled(*parts[::-1])
    assert one.exponent == other.exponent
    assert np.array_equal(one.positive, other.positive)
    assert np.array_equal(one.negative, other.negative)


def test_widening_loses_no_count() -> None:
    histogram = filled(np.float32([1.0, 0.5, -0.25]), np.float32([1000.0]))
    assert histogram.positive.sum() + histogram.negative.sum() == 4
    assert histogram.amax == 1000.0


def test_power_of_two_lies_inside_the_range() -> None:
    histogram = filled(np.float32([8.0, -8.0]))
    assert histogram.positive.sum() == 1
    assert histogram.negative.sum() == 1


def test_a_value_far_below_a_bins_width_keeps_its_sign() -> None:
    histogram = filled(np.float32([-1e-30, 1e-30, 4095.0]))
    assert (histogram.negative[0], histogram.positive[0]) == (1, 1)


def test_exact_zeros_are_counted_apart() -> None:
    histogram = filled(np.float32([0.0, -0.0, 1e-6, 1.0]))
    assert (histogram.zeros, histogram.elements, int(histogram.positive.sum())) == (2, 4, 2)


def test_extremes_are_exact_when_values_are_sampled() -> None:
    values = np.zeros(1000, np.float32)
    values[501] = 5.0
    histogram = Histogram()
    histogram.add(measure(values, samples=10))
    assert histogram.maximum == 5.0
    assert histogram.elements < 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="1 of 3 values are not finite"):
        filled(np.float32([1.0, bad, 2.0]))


@pytest.mark.parametrize("method", list(RangeMethod))
def test_a_tensor_of_zeros_has_no_range(method: RangeMethod) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        find_range(filled(np.zeros(10, np.float32)), method)


def test_state_brings_everything_back() -> None:
    histogram = filled(np.float32([1.5, -2.0, 0.0]))
    again = Histogram.from_state(histogram.state())
    assert again.state().keys() == histogram.state().keys()
    assert all(np.array_equal(again.state()[k], v) for k, v in histogram.state().items())


def test_minmax_is_exact() -> None:
    found = find_range(filled(np.float32([-1.25, 3.0])), RangeMethod.MINMAX)
    assert (found.low, found.high, found.amax) == (-1.25, 3.0, 3.0)


def test_positive_values_keep_zero_in_the_range() -> None:
    found = find_range(filled(np.float32([2.0, 3.0])), RangeMethod.MINMAX)
    assert found.low == 0.0


def test_percentile_agrees_with_numpy_within_a_bin() -> None:
    values = np.random.default_rng(2).exponential(1.0, 1_000_000).astype(np.float32)
    histogram = filled(values)
    found = find_range(histogram, RangeMethod.PERCENTILE)
    assert found.high == pytest.approx(float(np.percentile(values, 99.999)), abs=histogram.width)


def test_percentile_is_minmax_for_few_values() -> None:
    histogram = filled(np.linspace(-1, 2, 1000, dtype=np.float32))
    found = find_range(histogram, RangeMethod.PERCENTILE)
    assert (found.low, found.high) == pytest.approx((-1.0, 2.0), abs=histogram.width)


def brute_force_mse(values: NDArray[np.float32]) -> float:
    def error(limit: float) -> float:
        step = 2 * limit / 255
        quantized = np.round(np.clip(values, -limit, limit) / step) * step
        return float(np.square(quantized - values).sum())

    limits = np.linspace(0.02, 1.0, 50) * np.abs(values).max()
    return float(limits[np.argmin([error(limit) for limit in limits])])


def test_mse_finds_what_trying_on_the_values_finds() -> None:
    values = np.random.default_rng(3).laplace(0, 1, 50_000).astype(np.float32)
    found = find_range(filled(values), RangeMethod.MSE)
    assert found.amax == pytest.approx(brute_force_mse(values), rel=0.05)


def test_l3_clips_less_than_mse() -> None:
    values = np.random.default_rng(4).standard_t(3, 200_000).astype(np.float32)
    histogram = filled(values)
    l3, mse = (find_range(histogram, m).amax for m in (RangeMethod.L3, RangeMethod.MSE))
    assert mse < l3 <= histogram.amax


def test_entropy_is_not_minmax_in_disguise() -> None:
    values = np.random.default_rng(5).normal(0, 1, 200_000).astype(np.float32)
    values[:3] = 60.0
    found = find_range(filled(values), RangeMethod.ENTROPY)
    assert 3.0 < found.amax < 30.0


def test_zeros_of_a_relu_do_not_move_entropy() -> None:
    values = np.abs(np.random.default_rng(6).normal(0, 1, 100_000)).astype(np.float32)
    plain, padded = filled(values), filled(values, np.zeros(1_000_000, np.float32))
    assert find_range(plain, RangeMethod.ENTROPY) == find_range(padded, RangeMethod.ENTROPY)


def test_every_method_stays_inside_what_was_seen() -> None:
    values = np.random.default_rng(7).gamma(0.5, 2.0, 30_000).astype(np.float32) - np.float32(0.5)
    histogram = filled(values)
    for name in RangeMethod:
        found = find_range(histogram, name)
        assert histogram.minimum <= found.low <= 0 <= found.high <= histogram.maximum, name
        assert 0 < found.amax <= histogram.amax, name


def test_mostly_zero_tensor_keeps_its_only_values() -> None:
    found = find_range(filled(np.zeros(1_000_000, np.float32), np.float32([4.0])), RangeMethod.PERCENTILE)
    assert (found.low, found.high, found.amax) == (0.0, 4.0, 4.0)
