"""Means over seeds, paired differences, fits over sizes, and what a curve says at a budget."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    error: float  # the standard error; nan of one value
    n: int


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of differences seed by seed, with its interval of `CONFIDENCE` by Student's t; nan
    of one pair.
    """

    low: float
    high: float


def mean(values):
    """The `Mean` of a sequence of numbers; nan of none."""
    values = np.asarray(list(values), np.float64)
    if not values.size:
        return Mean(math.nan, math.nan, 0)
    error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else math.nan
    return Mean(float(values.mean()), float(error), values.size)


def paired_difference(values, baseline):
    """The `Difference` of two `{seed: value}` over the seeds that both have."""
    found = mean(values[seed] - baseline[seed] for seed in values if seed in baseline)
    reach = math.nan
    if found.n > 1:
        reach = found.error * float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1))
    return Difference(found.value, found.error, found.n, found.value - reach, found.value + reach)


def at(curve_x, curve_y, x):
    """A curve at `x`, linear in log x between its points; nan outside of them."""
    curve_x, curve_y = np.asarray(curve_x, np.float64), np.asarray(curve_y, np.float64)
    if not curve_x.size or not curve_x[0] <= x * (1 + 1e-9) or not x <= curve_x[-1] * (1 + 1e-9):
        return math.nan
    return float(np.interp(math.log(x), np.log(curve_x), curve_y))


@dataclass(frozen=True)
class Fit:
    """`loss = floor + factor * x ** -exponent`, with those of bootstrap resamples."""

    floor: float
    factor: float
    exponent: float
    resampled: np.ndarray  # [B, 3]: floor, factor, exponent
    has_floor: bool  # False: it is 0, for want of sizes to tell

    def __call__(self, x):
        """The loss at `x` (a number or an array)."""
        return self.floor + self.factor * np.asarray(x, np.float64) ** -self.exponent

    def band(self, x):
        """`(low, high)` of the loss at `x`, in which `CONFIDENCE` of the resamples lie."""
        floor, factor, exponent = self.resampled.T[:, :, None]
        return _quantiles(floor + factor * np.atleast_1d(np.asarray(x, np.float64)) ** -exponent)

    def exponent_interval(self):
        """`(low, high)` of the exponent; nan where no size has two seeds."""
        return _interval(self.resampled[:, 2])


def _interval(values):
    """`(low, high)` in which `CONFIDENCE` of the resamples lie; nan where they are alike but for
    rounding, or one is nan.
    """
    if np.ptp(values) <= 1e-9 * np.abs(values).max():
        return math.nan, math.nan
    return tuple(_quantiles(values))


def _quantiles(values):
    """`(low, high)` of the middle `CONFIDENCE` along the first axis."""
    return np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


MIN_SIZES, MIN_SIZES_WITH_FLOOR = 2, 4


def fit_power_law(groups, n_resamples=500):
    """Fits a power law to losses of several sizes; None of fewer than two.

    With fewer than four sizes a floor can't be told from an exponent: it is 0 then, and the fit a
    line in log loss, log x.

    Args:
      groups: `{x: [loss of each seed]}`, one entry a size; x > 0.
      n_resamples: of the bootstrap, which draws the seeds of each size anew.

    Returns:
      A `Fit`.
    """
    groups = {x: np.asarray(losses, np.float64) for x, losses in groups.items() if len(losses)}
    if len(groups) < MIN_SIZES:
        return None
    xs, has_floor = np.array(list(groups)), len(groups) >= MIN_SIZES_WITH_FLOOR
    best = _fit(xs, _means(groups), has_floor)
    resampled = [
        _fit(xs, losses, has_floor, best) for losses in _resampled_means(groups, n_resamples)
    ]
    return Fit(*best, np.array(resampled), has_floor)


def _means(groups):
    return np.array([losses.mean() for losses in groups.values()])


def _resampled_means(groups, n_resamples):
    """The bootstrap: means of each size over seeds drawn anew."""
    rng = np.random.default_rng(0)
    for _ in range(n_resamples):
        yield np.array([rng.choice(losses, losses.size).mean() for losses in groups.values()])


def _fit(xs, losses, has_floor, start=None):
    """`(floor, factor, exponent)` of least squares in log loss."""
    slope, intercept = np.polyfit(np.log(xs), np.log(losses), 1)
    if not has_floor:
        return 0.0, math.exp(intercept), -slope
    scale = math.exp(np.log(xs).mean())  # so that the parameters are of one size

    def residuals(p):
        floor, factor, exponent = p
        return np.log(floor + factor * (xs / scale) ** -exponent) - np.log(losses)

    if start is None:
        first = (0.5 * losses.min(), losses.mean() - 0.5 * losses.min(), max(-2 * slope, 1e-3))
    else:
        first = (start[0], start[1] * scale ** -start[2], start[2])
    bounds = ([0, 1e-12, 0], [losses.min(), np.inf, 10])
    floor, factor, exponent = optimize.least_squares(
        residuals, np.clip(first, *bounds), bounds=bounds
    ).x
    return floor, factor * scale**exponent, exponent


@dataclass(frozen=True)
class Parabola:
    """A loss that is a parabola in log x, with those of bootstrap resamples."""

    centre: float  # of log x, where the coefficients are taken
    coefficients: np.ndarray  # [3], the square's first
    resampled: np.ndarray  # [B, 3]

    def __call__(self, x):
        """The loss at `x` (a number or an array)."""
        return np.polyval(self.coefficients, np.log(x) - self.centre)

    def band(self, x):
        """`(low, high)` of the loss at `x`, in which `CONFIDENCE` of the resamples lie."""
        return _quantiles(
            np.polyval(self.resampled.T[:, :, None], np.log(np.atleast_1d(x)) - self.centre)
        )

    def minimum(self):
        """The `x` of least loss; nan of a parabola that has none."""
        return float(self._minima(self.coefficients))

    def minimum_interval(self):
        """`(low, high)` of it; nan where no size has two seeds or a resample has no minimum."""
        return _interval(self._minima(self.resampled.T))

    def _minima(self, coefficients):
        square, slope, _ = coefficients
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(square > 0, np.exp(self.centre - slope / (2 * square)), np.nan)


MIN_SIZES_OF_PARABOLA = 3


def fit_parabola(groups, n_resamples=500):
    """Fits a `Parabola` to the mean losses of several sizes, by least squares; None of fewer than
    three.

    Args:
      groups: `{x: [loss of each seed]}`, one entry a size; x > 0.
      n_resamples: of the bootstrap.
    """
    groups = {x: np.asarray(losses, np.float64) for x, losses in groups.items() if len(losses)}
    if len(groups) < MIN_SIZES_OF_PARABOLA:
        return None
    logs = np.log(list(groups))
    centre = float(logs.mean())
    best = np.polyfit(logs - centre, _means(groups), 2)
    # All resamples at once, a column each.
    resampled = np.polyfit(
        logs - centre, np.array(list(_resampled_means(groups, n_resamples))).T, 2
    )
    return Parabola(centre, best, resampled.T)
