import math

import numpy as np
import pandas as pd
import pytest

from aoe_jax.compare.statistics import (
    at,
    exponent,
    fit_parabola,
    fit_power_law,
    mean,
    minimum,
    number,
)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999.4, "999"),
        (999.6, "1k"),
        (1024, "1.02k"),
        (999.7e9, "1T"),
        (4e12, "4T"),
        (-2e6, "-2M"),
    ],
)
def test_numbers_have_three_digits(value, words):
    assert number(value) == words


def test_mean_and_standard_error():
    found = mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3) and found.n == 3
    assert found.error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert math.isnan(mean([1.0]).error) and math.isnan(mean([]).value)


def test_paired_difference_of_known_interval():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), and t of 2 degrees of freedom at 97.5%
    # is 4.302653.
    values = pd.Series({0: 11.0, 1: 22.0, 2: 33.0, 7: 99.0})
    found = mean(values - pd.Series({0: 10.0, 1: 20.0, 2: 30.0, 5: 0.0}))
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - found.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    one = mean(pd.Series({0: 1.0}) - pd.Series({0: 3.0}))
    assert one.value == -2.0 and math.isnan(one.low)


def test_what_seeds_share_cancels_in_paired_differences():
    rng = np.random.default_rng(0)
    shared = pd.Series(rng.normal(0, 10, 5))
    found = mean((shared + 0.5) - shared)
    assert found.low == pytest.approx(0.5) and found.high == pytest.approx(0.5)


def test_a_curve_at_a_budget():
    assert at([1, 100], [4.0, 2.0], 10) == pytest.approx(3.0)
    assert at([1, 100], [4.0, 2.0], 100) == pytest.approx(2.0)
    assert math.isnan(at([1, 100], [4.0, 2.0], 101)) and math.isnan(at([], [], 1))


def test_power_law_of_few_sizes_has_no_floor():
    fit = fit_power_law({x: [3 * x**-0.1, 3 * x**-0.1] for x in (1e5, 3e5, 1e6)})
    assert fit.parameters[0] == 0
    assert tuple(fit.parameters) == pytest.approx((0, 3.0, 0.1))
    assert fit_power_law({1e5: [1.0]}) is None


def test_power_law_with_a_floor_is_found_again():
    def law(x):
        return 1.7 + 40 * x**-0.3

    rng = np.random.default_rng(0)
    groups = {x: law(x) + rng.normal(0, 1e-4, 3) for x in np.geomspace(1e4, 1e8, 6)}
    fit = fit_power_law(groups, n_resamples=50)
    assert fit.parameters[0] > 0
    assert tuple(fit.parameters) == pytest.approx((1.7, 40, 0.3), rel=0.01)
    low, high = fit.interval(exponent)
    assert low <= fit.figure(exponent) <= high and high - low < 0.01
    assert fit(1e6) == pytest.approx(law(1e6), rel=1e-3)


def test_bands_widen_with_the_spread_of_seeds():
    widths = []
    for spread in (0.01, 0.1):
        groups = {x: 3 * x**-0.1 + spread * np.array([-1, 0, 1]) for x in (1e5, 3e5, 1e6)}
        low, high = fit_power_law(groups).band(3e5)
        widths.append(high[0] - low[0])
    assert widths[1] == pytest.approx(10 * widths[0], rel=0.2)


def test_a_parabola_is_found_again_with_its_minimum():
    groups = {
        x: [2 + 0.3 * np.log(x / 5e5) ** 2 + d for d in (-0.01, 0.01)] for x in (1e5, 3e5, 1e6, 3e6)
    }
    fit = fit_parabola(groups)
    assert fit.figure(minimum) == pytest.approx(5e5) and fit(5e5) == pytest.approx(2.0)
    low, high = fit.interval(minimum)
    assert 4e5 < low < 5e5 < high < 6e5
    below, above = fit.band(5e5)
    assert below[0] < 2 < above[0]
    assert fit_parabola({x: groups[x] for x in (1e5, 3e5)}) is None
    falling = fit_parabola({1e5: [5.0], 3e5: [4.0], 1e6: [2.0]})
    assert np.isnan([falling.figure(minimum), *falling.interval(minimum)]).all()
