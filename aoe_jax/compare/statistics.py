"""Means over seeds, paired differences, fits over sizes, and how the report writes numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

CONFIDENCE = 0.95
ABOUT_EQUAL = 1.1  # ratio up to which training FLOPs, or parameters, count as equal
MIN_SIZES, MIN_SIZES_WITH_FLOOR, MIN_SIZES_OF_PARABOLA = 2, 4, 3
N_RESAMPLES = 500  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or over differences seed by seed."""

    value: float
    error: float  # the standard error; NaN for fewer than two values
    n: int
    low: float  # of the interval of CONFIDENCE by Student's t; NaN for fewer than two values
    high: float

    def text(self, digits=4):
        if not self.n:
            return "-"
        error = f" ± {self.error:.{digits}f}" if self.n > 1 else ""
        return f"{self.value:.{digits}f}{error}"

    def as_difference(self):
        if self.n < 2:
            return f"{self.value:+.4f}" if self.n else "-"
        return f"{self.value:+.4f} ± {self.error:.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean(values):
    """Returns the `Estimate` of the mean of numbers, without those that are NaN."""
    values = pd.Series(values, dtype=float).dropna()
    value, error, n, reach = values.mean(), values.sem(), len(values), math.nan
    if n > 1:
        reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return Estimate(float(value), float(error), n, float(value - reach), float(value + reach))


def at(curve_x, curve_y, x):
    """Interpolates a curve at `x`, linearly in log x; NaN outside of its points."""
    logs, log_x = np.log(np.asarray(curve_x, float)), math.log(x)
    if not logs.size or not logs[0] - 1e-9 <= log_x <= logs[-1] + 1e-9:
        return math.nan
    return float(np.interp(log_x, logs, curve_y))


def number(value):
    """Writes a count with three digits and a unit, such as 1.02k."""
    # The factor: 999.6 rounds to a thousand, and so is written with the next unit.
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def markdown_table(rows):
    """Formats dicts as a Markdown table; the first column is text, the others are numbers."""
    frame = pd.DataFrame(rows).map(lambda cell: str(cell).replace("|", "\\|"))
    alignment = ("left", *["right"] * (frame.shape[1] - 1))
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


@dataclass(frozen=True)
class Fit:
    """A curve fitted to the mean losses of several sizes, with bootstrap resamples."""

    curve: Callable  # (x, *parameters) -> loss
    parameters: np.ndarray  # [P]
    resampled: np.ndarray  # [B, P]

    def __call__(self, x):
        return self.curve(np.asarray(x, float), *self.parameters)

    def band(self, x):
        """Returns the middle CONFIDENCE of the resampled losses at `x`, `(low, high)`."""
        return _middle(self.curve(np.atleast_1d(x).astype(float), *self.resampled.T[:, :, None]))

    def figure(self, function):
        """Returns `exponent` or `minimum` of the curve."""
        return float(function(*self.parameters))

    def interval(self, function):
        """Returns `(low, high)` of `exponent` or `minimum`; NaN if no size has two seeds, or if a
        resample has no minimum.
        """
        values = function(*self.resampled.T)
        if np.ptp(values) <= 1e-9 * np.abs(values).max():  # equal but for rounding
            return math.nan, math.nan
        return tuple(_middle(values))


def _middle(values):
    return np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


def power_law(x, floor, factor, exponent):
    return floor + factor * x**-exponent


def exponent(floor, factor, exponent):
    return exponent


def parabola(x, square, slope, constant):
    return (square * np.log(x) + slope) * np.log(x) + constant


def minimum(square, slope, constant):
    """Returns the `x` of least loss of a `parabola`; NaN if it has none."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(square > 0, np.exp(-slope / (2 * square)), np.nan)


def _means(groups, n_resamples):
    """Returns `(x [N], mean losses [N], means of bootstrap resamples of the seeds [B, N])`."""
    rng = np.random.default_rng(0)
    losses = [np.asarray(of_size, float) for of_size in groups.values()]
    draws = [rng.choice(of_size, (n_resamples, of_size.size)).mean(axis=1) for of_size in losses]
    means = np.array([of_size.mean() for of_size in losses])
    return np.array(list(groups), float), means, np.stack(draws, axis=1)


def fit_power_law(groups, n_resamples=N_RESAMPLES):
    """Fits a `power_law` by least squares in log loss to `{x: [loss of each seed]}` with x > 0.

    The result is None for fewer than two sizes. Fewer than four sizes cannot separate a floor from
    an exponent, so the floor is 0 for them: a line in log x and log loss.
    """
    if len(groups) < MIN_SIZES:
        return None
    x, means, resampled = _means(groups, n_resamples)
    if len(groups) < MIN_SIZES_WITH_FLOOR:
        return Fit(power_law, _line(x, means), _line(x, resampled.T).T)
    scale = math.exp(np.log(x).mean())  # so that the parameters are of one magnitude
    guess = 0.5 * means.min(), means.mean() - 0.5 * means.min(), max(2 * _line(x, means)[2], 1e-3)
    best = _fit_with_floor(x / scale, means, guess)
    of_resamples = np.array([_fit_with_floor(x / scale, row, best) for row in resampled])
    for parameters in (best, of_resamples.T):
        parameters[1] *= scale ** parameters[2]
    return Fit(power_law, best, of_resamples)


def _line(x, losses):
    """Returns `[floor 0, factor, exponent]`, each with the trailing axes of `losses [N, ...]`."""
    slope, intercept = np.polyfit(np.log(x), np.log(losses), 1)
    return np.stack([np.zeros_like(slope), np.exp(intercept), -slope])


def _fit_with_floor(x, losses, guess):
    def residuals(parameters):
        return np.log(power_law(x, *parameters)) - np.log(losses)

    bounds = ([0, 1e-12, 0], [losses.min(), np.inf, 10])
    return optimize.least_squares(residuals, np.clip(guess, *bounds), bounds=bounds).x


def fit_parabola(groups):
    """Fits a `parabola` to groups, see `fit_power_law`; None for fewer than three sizes."""
    if len(groups) < MIN_SIZES_OF_PARABOLA:
        return None
    x, means, resampled = _means(groups, N_RESAMPLES)
    best, of_resamples = (np.polyfit(np.log(x), losses, 2) for losses in (means, resampled.T))
    return Fit(parabola, best, of_resamples.T)
