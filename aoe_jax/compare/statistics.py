"""Computes means over seeds, paired differences and power laws over sizes; formats numbers."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds of a value, or of a paired difference."""

    value: float
    error: float  # the standard error; NaN for fewer than two values
    n: int
    low: float  # lower end of the CONFIDENCE interval, by Student's t; NaN if n is below 2
    high: float
    p: float  # of the two-sided t-test against 0; NaN if n is below 2

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
    """Returns the `Estimate` of the mean of numbers; NaNs are left out."""
    values = pd.Series(values, dtype=float).dropna()
    value, error, n = float(values.mean()), float(values.sem()), len(values)
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) if n > 1 else math.nan
    p = 2 * float(stats.t.sf(abs(value / error), n - 1)) if n > 1 and error else math.nan
    return Estimate(value, error, n, value - reach, value + reach, p)


def holm(p):
    """Holm's correction of the p-values of M tests, `[M]` -> `[M]`. NaN stays NaN, uncounted."""
    p = pd.Series(p, dtype=float)
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)


def at(curve_x, curve_y, x):
    """Interpolates a curve at `x`, linearly in log x; NaN outside the curve."""
    logs, log_x = np.log(np.asarray(curve_x, float)), math.log(x)
    if not logs.size or not logs[0] - 1e-9 <= log_x <= logs[-1] + 1e-9:
        return math.nan
    return float(np.interp(log_x, logs, curve_y))


def number(value):
    """Formats a number with three digits and a unit, such as 1.02k."""
    # The limit is 0.9995 of a unit, because 999.6 rounded to three digits is 1000, written as 1k.
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def markdown_table(rows):
    """Formats dicts as a Markdown table; columns after the first one are aligned to the right."""
    frame = pd.DataFrame(rows).map(lambda cell: str(cell).replace("|", "\\|"))
    alignment = ("left", *["right"] * (frame.shape[1] - 1))
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def fit_power_law(groups):
    """Fits `loss = factor * x^-exponent` to the means of `{x: [loss of each seed]}`, by least
    squares in log x and log loss. Returns `(factor, exponent)`.
    """
    means = [np.mean(of_size) for of_size in groups.values()]
    slope, intercept = np.polyfit(np.log(list(groups)), np.log(means), 1)
    return float(np.exp(intercept)), -float(slope)
