"""Draws the pictures of a report. Each drawing function returns a matplotlib `Figure`.

`styles` is the result of `styles_of`: an arm has the same colour and line style in all pictures.
"""

import textwrap

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from aoe_jax.compare.statistics import mean, number
from aoe_jax.evaluation.loads import draw_loads
from aoe_jax.training import picture
from aoe_jax.training.picture import add_legend, drawn, new_figure, styles_of

AXES = {
    "tokens": "training tokens",
    "flops": "useful training FLOPs",
    "seconds": "seconds of training steps",
}
POINTS = {"fmt": "o", "markersize": 4, "capsize": 2}  # points with error bars


def _label(axis, locator):
    """Sets few ticks on an axis, with labels such as 3M."""
    axis.set_major_locator(locator)
    axis.set_major_formatter(lambda value, _: number(value))
    axis.set_minor_locator(NullLocator())


def _log_x(axes):
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)
    _label(axes.xaxis, LogLocator(subs=subs))


def _over_seeds(rows, columns):
    """Returns means over seeds by step, at the steps that all seeds have reported."""
    steps = rows.groupby("step")
    complete = steps["seed"].nunique() == rows["seed"].nunique()
    return steps[columns].mean()[complete]


@drawn
def loss_curves(curves, styles, axis):
    """Draws lines of training losses and of validation losses, against `axis` of AXES.

    `curves` has the rows of `Results.curves` that belong to the finished runs of a size.
    """
    figure, (axes,) = new_figure(3.5)
    late, lowest, first_x = [], [], []
    for arm, of_arm in curves.groupby("arm", sort=False):
        train = _over_seeds(of_arm[of_arm["split"] == "train"], [axis, "nll"])
        nll = picture.smoothed(train["nll"])
        axes.plot(train[axis], nll, **styles[arm])
        points = _over_seeds(of_arm[of_arm["split"] == "validation"], [axis, "nll"])
        axes.plot(points[axis], points["nll"], color=styles[arm]["color"], **picture.VALIDATION)
        late += [*nll[len(nll) // 4 :]]
        lowest += [min(late), *points["nll"]]
        first_x.append(train[axis].iloc[len(train) // 12])
    axes.set_xlim(left=min(first_x))  # leaves out the steep start, which would hide differences
    _log_x(axes)
    margin = 0.08 * (max(late) - min(late))
    axes.set_ylim(min(lowest) - margin, max(late) + 3 * margin)
    axes.set(xlabel=AXES[axis], ylabel="nll, nats a token")
    add_legend(figure, axes)
    return figure


@drawn
def scaling(fitted, styles, xlabel):
    """Draws means with standard errors, joined by lines, because fits may miss them; `fitted` is
    the result of `Results.scaling`.
    """
    figure, (axes,) = new_figure(3.8)
    for arm, (groups, _) in fitted.items():
        colour, means = styles[arm]["color"], [mean(losses) for losses in groups.values()]
        values = [found.value for found in means]
        errors = np.nan_to_num([found.error for found in means])
        axes.errorbar(list(groups), values, errors, color=colour, **POINTS)
        axes.plot(list(groups), values, **styles[arm])
    _log_x(axes)
    axes.set(xlabel=xlabel, ylabel="validation nll, nats a token")
    add_legend(figure, axes)
    return figure


@drawn
def differences(rows, styles):
    """Draws differences and their intervals, one for each `(arm, label, Estimate)` in `rows`."""
    rows = [(arm, textwrap.fill(label, width=34), found) for arm, label, found in rows]
    lines = sum(1 + label.count("\n") for _, label, _ in rows)
    figure, (axes,) = new_figure(0.9 + 0.09 * len(rows) + 0.15 * lines)
    for height, (arm, _, found) in enumerate(reversed(rows)):
        reach, colour = np.nan_to_num(found.high - found.value), styles[arm]["color"]
        axes.errorbar([found.value], [height], xerr=[reach], color=colour, **POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)])
    axes.set(xlabel="difference of nll, nats a token")
    axes.grid(axis="y", visible=False)
    return figure


@drawn
def against_setting(panels, styles, xlabel):
    """Draws a panel for each frame; its rows are values of the setting, its columns are arms."""
    figure, rows = new_figure(0.6 + 1.9 * len(panels), len(panels))
    for axes, (name, frame) in zip(rows, panels.items(), strict=True):
        for arm in frame:
            values = frame[arm].dropna()
            axes.plot(values.index, values, marker="o", markersize=3.5, **styles[arm])
        if axes is rows[0]:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            _label(axes.yaxis, MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_ylabel(name)
    bottom = rows[-1]
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(frame.index, [f"{x:g}" for x in frame.index])
    bottom.xaxis.set_minor_locator(NullLocator())
    bottom.set_xlabel(xlabel)
    add_legend(figure, rows[0])
    return figure


@drawn
def load_heatmaps(results, size):
    """Draws the final loads of the first seed of every analysed arm, with a panel for each arm."""
    of_arms = results.routed(size).items()
    final = {results.labels[arm]: choices[0]["checkpoints"][-1] for arm, choices in of_arms}
    return draw_loads(final)


def some_layers(n_layers):
    return np.unique(np.linspace(0, n_layers - 1, min(n_layers, 4)).round().astype(int))


@drawn
def scores_through_training(choices, name, title):
    """Draws the mean score (`name`) of every expert at each checkpoint, like the paper's Fig. 4.

    `choices` is the content of a routing.json. `name` is the kind of score: norm, max or logit.
    """
    steps = [checkpoint["step"] for checkpoint in choices["checkpoints"]]
    scores = np.array([checkpoint["mean_score"] for checkpoint in choices["checkpoints"]])
    _, n_layers, n = scores.shape
    layers = some_layers(n_layers)
    experts = styles_of({i: i for i in range(n)})
    figure, panels = new_figure(0.6 + 1.35 * len(layers), len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        for expert, style in experts.items():
            values = scores[:, layer, expert]
            axes.plot(steps, values, linewidth=1.1, marker=".", markersize=3, **style)
        axes.set_title(f"layer {layer}", loc="left", fontsize=8)
        axes.set_ylabel(f"mean {name}")
    panels[-1].set_xlabel("step")
    figure.suptitle(title, x=0.02, ha="left", fontsize=9)
    if n <= 16:  # more lines are hard to tell apart
        options = {"title": "expert", "title_fontsize": 8, "handlelength": 1.6}
        figure.legend(handles=[*panels[0].lines], loc="outside right upper", **options)
    return figure


@drawn
def through_training(routing, styles, name, ylabel):
    """Draws the column `name` of `routing` over training, as means over layers and seeds."""
    by_arm = routing.groupby("arm", sort=False)
    figure, (axes,) = new_figure(2.8)
    for arm, rows in by_arm:
        values = _over_seeds(rows, name)
        shares = 100 * values.index / values.index[-1]
        axes.plot(shares, values, marker="o", markersize=3, **styles[arm])
    axes.set(xlabel="share of the training, %", ylabel=ylabel)
    if not routing[name].any():  # all values are 0, which is common for dead experts
        axes.set_ylim(0, 1)
    add_legend(figure, axes)
    return figure


@drawn
def save(figure, file):
    """Saves a figure as PNG in `file`, and as SVG beside it."""
    picture.write_png(file, figure)
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
