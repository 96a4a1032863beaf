import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aoe_jax.compare.statistics import at, fit_power_law, holm, mean, number


def test_numbers_have_three_digits():
    words = {0: "0", 0.5: "0.5", 999.4: "999", 999.6: "1k", 1024: "1.02k", 999.7e9: "1T"}
    assert {value: number(value) for value in words} == words
    assert (number(4e12), number(-2e6)) == ("4T", "-2M")


def test_means_and_paired_differences():
    found = mean([1.0, 2.0, 4.0])
    assert found.value == pytest.approx(7 / 3) and found.n == 3
    assert found.error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert math.isnan(mean([]).value)
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), and t of 2 degrees of freedom at 97.5%
    # is 4.302653.
    values = pd.Series({0: 11.0, 1: 22.0, 2: 33.0, 7: 99.0})
    found = mean(values - pd.Series({0: 10.0, 1: 20.0, 2: 30.0, 5: 0.0}))
    assert (found.value, found.n) == (2.0, 3)
    reach = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach), rel=1e-6)
    # t = 2 sqrt(3) with 2 degrees of freedom; its p-value is 1 - t / sqrt(2 + t^2).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-6)
    one = mean(pd.Series({0: 1.0}) - pd.Series({0: 3.0}))
    assert one.value == -2.0 and math.isnan(one.error) and math.isnan(one.low)


def test_holms_correction():
    """The smallest p-value times the number of tests, and so on; never below a smaller one."""
    found = holm([0.01, math.nan, 0.04, 0.03, 0.5])
    np.testing.assert_allclose(found, [0.04, math.nan, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.6]).tolist() == [1, 1] and math.isnan(mean([1.0]).p)


def test_a_curve_at_a_budget():
    assert at([1, 100], [4.0, 2.0], 10) == pytest.approx(3.0)
    assert at([1, 100], [4.0, 2.0], 100) == pytest.approx(2.0)
    assert math.isnan(at([1, 100], [4.0, 2.0], 101)) and math.isnan(at([], [], 1))


def test_a_power_law_is_a_line_in_logarithms():
    exact = fit_power_law({x: [3 * x**-0.1, 3 * x**-0.1] for x in (1e5, 3e5, 1e6)})
    assert exact == pytest.approx((3.0, 0.1))
    rng, x = np.random.default_rng(0), np.geomspace(1e4, 1e8, 6)
    groups = {size: 4 * size**-0.05 + rng.normal(0, 1e-2, 3) for size in x}
    line = stats.linregress(np.log(x), np.log([losses.mean() for losses in groups.values()]))
    assert fit_power_law(groups) == pytest.approx((np.exp(line.intercept), -line.slope))
