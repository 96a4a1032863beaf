"""The figures of losses: against tokens, FLOPs and seconds, and over sizes. Each function returns a
`Figure`.

`series` is `{arm: [Result, ...]}`, the finished runs of one size; `labels` are the names that arms
have in figures.
"""

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from aoe_jax.compare import style
from aoe_jax.compare.statistics import mean
from aoe_jax.compare.words import number

AXES = {
    "tokens": "training tokens",
    "flops": "useful training FLOPs",
    "seconds": "seconds of training steps",
}
SMOOTHING = 0.04  # of the steps: training losses are means over windows of this share


def drawn(function):
    """Draws in the style of `style.SETTINGS`."""

    def styled(*args, **kwargs):
        with matplotlib.rc_context(style.SETTINGS):
            return function(*args, **kwargs)

    return styled


def _mean_curve(results):
    """`(steps, nll)` of training batches: the mean over seeds at the steps that all have reported,
    smoothed.
    """
    steps = results[0].train.step
    for result in results[1:]:
        steps = np.intersect1d(steps, result.train.step)
    nll = np.mean([r.train.nll[np.isin(r.train.step, steps)] for r in results], axis=0)
    width = max(1, round(len(steps) * SMOOTHING))
    counts = np.convolve(np.ones(len(nll)), np.ones(width))[: len(nll)]
    return steps, np.convolve(nll, np.ones(width))[
        : len(nll)
    ] / counts  # means over windows that end at each step


@drawn
def loss_curves(series, labels, styles, axis):
    """Loss against `axis` (a key of `AXES`): training batches as lines, the validation split as
    points.
    """
    figure, ((axes,),) = style.new_figure(style.height_for(len(series), 3.5))
    ends, every = [], []
    for arm, results in series.items():
        cost = float(np.mean([result.per_step(axis) for result in results]))
        steps, nll = _mean_curve(results)
        axes.plot(steps * cost, nll, **styles[arm])
        validation = results[0].validation.step
        for result in results[1:]:
            validation = np.intersect1d(validation, result.validation.step)
        points = [
            np.mean([r.validation.nll[r.validation.step == step][0] for r in results])
            for step in validation
        ]
        axes.plot(validation * cost, points, "o", markersize=3.5, color=styles[arm]["color"])
        every.extend(nll[len(nll) // 4 :])
        ends.append((nll[-1], labels[arm], styles[arm]))
    axes.set_xlim(
        left=min(line.get_xdata()[len(line.get_xdata()) // 12] for line in axes.lines[::2])
    )
    _log_x(axes)
    margin = 0.08 * (max(every) - min(every))
    axes.set_ylim(
        min([*every, *(y for line in axes.lines[1::2] for y in line.get_ydata())]) - margin,
        max(every) + 3 * margin,
    )
    axes.set(xlabel=AXES[axis], ylabel="nll, nats a token")
    _label_after_layout(figure, axes, ends)
    return figure


def _log_x(axes):
    """A logarithmic axis with few labels, such as 3M."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _label_after_layout(figure, axes, ends):
    figure.draw_without_rendering()
    style.label_ends(axes, ends)


@drawn
def scaling(points, fits, labels, styles, xlabel):
    """Final loss against what a size costs: the mean over seeds with its standard error, fits, and
    their bands.

    Args:
      points: `{arm: {x: [loss of each seed]}}`.
      fits: `{arm: Fit or Parabola}`.
      labels: of arms.
      styles: of arms.
      xlabel: what x is.
    """
    figure, ((axes,),) = style.new_figure(style.height_for(len(points), 3.8))
    ends = []
    for arm, groups in points.items():
        xs, means = np.array(list(groups)), [mean(losses) for losses in groups.values()]
        errors = [0 if np.isnan(m.error) else m.error for m in means]
        axes.errorbar(
            xs,
            [m.value for m in means],
            errors,
            fmt="o",
            markersize=4,
            capsize=2,
            color=styles[arm]["color"],
        )
        line = np.geomspace(xs.min(), xs.max(), 60)
        low, high = fits[arm].band(line)
        axes.fill_between(line, low, high, color=styles[arm]["color"], alpha=0.15, linewidth=0)
        axes.plot(line, fits[arm](line), **styles[arm])
        ends.append((means[int(xs.argmax())].value, labels[arm], styles[arm]))
    _log_x(axes)
    axes.set(xlabel=xlabel, ylabel="validation nll, nats a token")
    _label_after_layout(figure, axes, ends)
    return figure


@drawn
def differences(rows, labels, styles):
    """Paired differences with intervals, a row for each of `[(size, arm, what follows its label,
    Difference)]`.
    """
    lines = sum(1 + behind.count("\n") for *_, behind, _ in rows)
    figure, ((axes,),) = style.new_figure(0.9 + 0.09 * len(rows) + 0.15 * lines)
    for height, (_, arm, _, found) in enumerate(reversed(rows)):
        reach = (
            [[found.value - found.low], [found.high - found.value]]
            if np.isfinite(found.low)
            else None
        )
        axes.errorbar(
            [found.value],
            [height],
            xerr=reach,
            fmt="o",
            markersize=4,
            capsize=2,
            color=styles[arm]["color"],
        )
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks(
        range(len(rows)),
        [f"{size}  {labels[arm]}{behind}" for size, arm, behind, _ in reversed(rows)],
    )
    axes.set(xlabel="difference of nll, nats")
    axes.grid(axis="y", visible=False)
    return figure


@drawn
def against_setting(panels, labels, styles, xlabel):
    """Quantities of each arm against a setting, a panel each, over one logarithmic axis.

    Args:
      panels: `[(what it is, whether its axis is logarithmic, {arm: [(x, y), ...]})]`.
      labels: of arms.
      styles: of arms.
      xlabel: the setting.
    """
    figure, rows = style.new_figure(0.6 + 1.9 * len(panels), len(panels), 1, sharex=True)
    every = sorted({x for _, _, lines in panels for points in lines.values() for x, _ in points})
    for axes, (what, logarithmic, lines) in zip(rows[:, 0], panels, strict=True):
        for arm, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, **styles[arm])
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [f"{x:g}" for x in every])
        axes.xaxis.set_minor_locator(NullLocator())
        if logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(
                MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5))
            )
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(what)
    rows[-1, 0].set_xlabel(xlabel)
    figure.draw_without_rendering()
    for axes, (_, _, lines) in zip(rows[:, 0], panels, strict=True):
        ends = [(points[-1][1], labels[arm], styles[arm]) for arm, points in lines.items()]
        style.label_ends(axes, ends)
    return figure
