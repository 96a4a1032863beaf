"""The figures of a report. Each drawing function returns a matplotlib `Figure`.

An arm has the same colour and line style everywhere. `labels` and `styles` are dicts by arm; L
layers, n experts.
"""

import functools
import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from aoe_jax.compare.statistics import mean, number

# The colours of Okabe and Ito, distinct for all kinds of colour vision, without yellow (pale on
# white) and black (invisible on black).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)), (0, (1, 3)))
# Text and axes have the colour INK, which a page replaces by its own text colour, light or dark.
INK = "#010203"
WIDTH, DPI = 4.6, 140
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "aoe_jax",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "lines.linewidth": 1.6,
}
AXES = {
    "tokens": "training tokens",
    "flops": "useful training FLOPs",
    "seconds": "seconds of training steps",
}
SMOOTHING = 0.04  # share of the steps over which training losses are averaged
MAX_LAYERS = 4  # for which norms are drawn
MAX_KEY = 16  # experts that a legend distinguishes


def styles_of(arms):
    """Returns the colour and line style of each arm; the first seven differ in colour.

    Raises:
      ValueError: there are more arms than styles.
    """
    if len(arms) > len(COLOURS) * len(DASHES):
        raise ValueError(f"{len(arms)} arms, but only {len(COLOURS) * len(DASHES)} line styles")
    return {
        arm: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS)]}
        for i, arm in enumerate(arms)
    }


def drawn(function):
    """Makes a function draw with SETTINGS."""

    @functools.wraps(function)
    def styled(*args, **kwargs):
        with matplotlib.rc_context(SETTINGS):
            return function(*args, **kwargs)

    return styled


def _new(height, rows=1, columns=1, **options):
    """Returns a `Figure` and its axes, an array `[rows, columns]`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _height(n_arms, least):
    """Returns a height with room for a legend of the arms."""
    return max(least, 0.7 + 0.17 * n_arms)


def _legend(figure, ends, labels, styles):
    """Adds a legend beside the axes, in the order of the lines' last values `{arm: value}`."""
    arms = sorted(ends, key=ends.get, reverse=True)
    handles = [Line2D([], [], **styles[arm]) for arm in arms]
    names = [labels[arm] for arm in arms]
    figure.legend(handles, names, loc="outside right upper", handlelength=2.4)
    figure.set_figwidth(3.3 + 0.07 * max(map(len, names)))


def _log_x(axes):
    """Makes the x axis logarithmic, with few labels such as 3M."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _common_steps(curve, axis):
    """Returns means over seeds of `axis` and nll, at the steps that all seeds have reported."""
    steps = curve.groupby("step")
    complete = steps["seed"].nunique() == curve["seed"].nunique()
    return steps[[axis, "nll"]].mean()[complete]


@drawn
def loss_curves(curves, labels, styles, axis):
    """Draws loss against a cost: training batches as lines, the validation split as points.

    Args:
      curves: `Results.curves` of the finished runs of a size.
      labels: of arms.
      styles: of arms.
      axis: a key of AXES.
    """
    arms = list(dict.fromkeys(curves["arm"]))
    figure, ((axes,),) = _new(_height(len(arms), 3.5))
    ends, late, lowest, first_x = {}, [], [], []
    for arm in arms:
        of_arm = curves[curves["arm"] == arm]
        train = _common_steps(of_arm[of_arm["split"] == "train"], axis)
        window = max(1, round(len(train) * SMOOTHING))
        nll = train["nll"].rolling(window, min_periods=1).mean().to_numpy()
        axes.plot(train[axis], nll, **styles[arm])
        points = _common_steps(of_arm[of_arm["split"] == "validation"], axis)
        axes.scatter(points[axis], points["nll"], s=12, color=styles[arm]["color"])
        late += [*nll[len(nll) // 4 :]]
        lowest += [min(late), *points["nll"]]
        first_x.append(train[axis].iloc[len(train) // 12])
        ends[arm] = nll[-1]
    axes.set_xlim(left=min(first_x))  # the steep beginning would hide the rest
    _log_x(axes)
    margin = 0.08 * (max(late) - min(late))
    axes.set_ylim(min(lowest) - margin, max(late) + 3 * margin)
    axes.set(xlabel=AXES[axis], ylabel="nll, nats a token")
    _legend(figure, ends, labels, styles)
    return figure


@drawn
def scaling(fitted, labels, styles, xlabel):
    """Draws final losses over sizes: means with standard errors, fits, and their bands.

    Args:
      fitted: `{arm: ({x: [loss of each seed]}, Fit)}`.
      labels: of arms.
      styles: of arms.
      xlabel: what x is.
    """
    figure, ((axes,),) = _new(_height(len(fitted), 3.8))
    ends = {}
    for arm, (groups, fit) in fitted.items():
        colour, means = styles[arm]["color"], [mean(losses) for losses in groups.values()]
        line = np.geomspace(min(groups), max(groups), 60)
        axes.plot(line, fit(line), **styles[arm])
        axes.fill_between(line, *fit.band(line), color=colour, alpha=0.15, linewidth=0)
        values = [found.value for found in means]
        errors = [found.error if found.n > 1 else 0 for found in means]
        options = {"fmt": "o", "markersize": 4, "capsize": 2, "color": colour}
        axes.errorbar(list(groups), values, errors, **options)
        ends[arm] = fit(line)[-1]
    _log_x(axes)
    axes.set(xlabel=xlabel, ylabel="validation nll, nats a token")
    _legend(figure, ends, labels, styles)
    return figure


@drawn
def differences(rows, styles):
    """Draws differences with their intervals, one line for each of `[(arm, label, Estimate)]`."""
    lines = sum(1 + label.count("\n") for _, label, _ in rows)
    figure, ((axes,),) = _new(0.9 + 0.09 * len(rows) + 0.15 * lines)
    for height, (arm, _, found) in enumerate(reversed(rows)):
        reach = found.high - found.value if found.n > 1 else 0
        options = {"fmt": "o", "markersize": 4, "capsize": 2, "color": styles[arm]["color"]}
        axes.errorbar([found.value], [height], xerr=[reach], **options)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)])
    axes.set(xlabel="difference of nll, nats")
    axes.grid(axis="y", visible=False)
    return figure


@drawn
def against_setting(panels, labels, styles, xlabel):
    """Draws quantities against a setting, a panel for each, over one logarithmic axis.

    Args:
      panels: `[(name, whether its axis is logarithmic, {arm: Series by setting})]`.
      labels: of arms.
      styles: of arms.
      xlabel: the setting.
    """
    figure, rows = _new(0.6 + 1.9 * len(panels), len(panels), 1, sharex=True)
    for axes, (name, logarithmic, lines) in zip(rows[:, 0], panels, strict=True):
        for arm, values in lines.items():
            axes.plot(values.index, values, marker="o", markersize=3.5, **styles[arm])
        if logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            few = MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5))
            axes.yaxis.set_major_locator(few)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_ylabel(name)
    bottom = rows[-1, 0]
    every = sorted({x for _, _, lines in panels for values in lines.values() for x in values.index})
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(every, [f"{x:g}" for x in every])
    bottom.xaxis.set_minor_locator(NullLocator())
    bottom.set_xlabel(xlabel)
    ends = {arm: values.iloc[-1] for arm, values in panels[0][2].items()}
    _legend(figure, ends, labels, styles)
    return figure


@drawn
def load_heatmaps(entries):
    """Draws the shares of load with both entropies (the paper's Fig. 3).

    Args:
      entries: `[(title, routing.json)]`, a panel for each.
    """
    layers = max(len(report["checkpoints"][-1]["load"]) for _, report in entries)
    figure, panels = _new(len(entries) * (0.65 + 0.24 * layers), len(entries), 1)
    for axes, (title, report) in zip(panels[:, 0], entries, strict=True):
        last = report["checkpoints"][-1]
        load = np.array(last["load"])
        share, n = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9), load.shape[1]
        axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=2 / n)
        options = {"va": "center", "fontsize": 7}
        for (row, column), value in np.ndenumerate(share) if n <= MAX_KEY else ():
            colour = "white" if value < 1 / n else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", color=colour, **options)
        of_load, of_choice = last["load_entropy"], last["confidence_entropy"]
        for row, pair in enumerate(zip(of_load, of_choice, strict=True)):
            axes.text(n - 0.3, row, "{:.2f}  {:.2f}".format(*pair), **options)
        means = f"mean Ent_load {np.mean(of_load):.3f}, Ent_conf {np.mean(of_choice):.3f}"
        axes.set_title(f"{title}\n{means}", loc="left", fontsize=8)
        axes.set_yticks(range(len(share)), [f"layer {i}" for i in range(len(share))], fontsize=7)
        _without_axes(axes)
    return figure


def _without_axes(axes):
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def some_layers(n_layers):
    """Returns the layers that `scores_through_training` draws."""
    return np.unique(np.linspace(0, n_layers - 1, min(n_layers, MAX_LAYERS)).round().astype(int))


@drawn
def scores_through_training(report, name, label):
    """Draws the mean norm or logit of every expert at each checkpoint (the paper's Fig. 4).

    Args:
      report: routing.json of a run.
      name: of the score.
      label: of the arm.
    """
    checkpoints = report["checkpoints"]
    steps = [checkpoint["step"] for checkpoint in checkpoints]
    scores = np.array([checkpoint["mean_score"] for checkpoint in checkpoints])  # [., L, n]
    layers, n = some_layers(scores.shape[1]), scores.shape[2]
    experts = styles_of(range(min(n, len(COLOURS) * len(DASHES))))
    figure, panels = _new(0.6 + 1.35 * len(layers), len(layers), 1, sharex=True)
    for axes, layer in zip(panels[:, 0], layers, strict=True):
        for expert in range(n):
            style = experts[expert % len(experts)]
            values = scores[:, layer, expert]
            axes.plot(steps, values, linewidth=1.1, marker=".", markersize=3, **style)
        axes.set_title(f"layer {layer}", loc="left", fontsize=8)
        axes.set_ylabel(f"mean {name}")
    panels[-1, 0].set_xlabel("step")
    figure.suptitle(label, x=0.02, ha="left", fontsize=9)
    if n <= MAX_KEY:
        options = {"title": "expert", "title_fontsize": 8, "handlelength": 1.6}
        lines = panels[0, 0].lines
        figure.legend(lines, range(n), loc="outside right upper", **options)
    return figure


def common_steps(reports):
    """Returns the steps of the checkpoints that all runs have kept, in order."""
    steps = [{checkpoint["step"] for checkpoint in report["checkpoints"]} for report in reports]
    return sorted(set.intersection(*steps))


@drawn
def through_training(runs, labels, styles, name, ylabel):
    """Draws a figure of routing.json, mean over layers and seeds, against the training's progress.

    Args:
      runs: `{arm: [routing.json of each seed]}`.
      labels: of arms.
      styles: of arms.
      name: the key of a list over layers.
      ylabel: what it is.
    """
    figure, ((axes,),) = _new(_height(len(runs), 2.8))
    ends = {}
    for arm, reports in runs.items():
        steps, values = common_steps(reports), []
        for report in reports:
            by_step = {checkpoint["step"]: checkpoint for checkpoint in report["checkpoints"]}
            values.append([np.mean(by_step[step][name]) for step in steps])
        values = np.mean(values, axis=0)
        progress = 100 * np.array(steps) / steps[-1]
        axes.plot(progress, values, marker="o", markersize=3, **styles[arm])
        ends[arm] = values[-1]
    axes.set(xlabel="share of the training, %", ylabel=ylabel)
    if not any(line.get_ydata().any() for line in axes.lines):  # such as no dead experts at all
        axes.set_ylim(0, 1)
    _legend(figure, ends, labels, styles)
    return figure


@drawn
def coactivation(entries):
    """Draws how often two experts of the last layer are chosen together, relative to chance.

    Chance has the same loads. Where every token has k > 1 experts, it draws k different ones; else
    it draws each expert independently.

    Args:
      entries: `[(title, routing.json)]`, a panel for each.
    """
    n_rows = -(-len(entries) // 2)
    figure, panels = _new(1.1 + 1.9 * n_rows, n_rows, 2)
    for axes in panels.flat[len(entries) :]:
        axes.set_visible(False)
    for axes, (title, report) in zip(panels.flat, entries, strict=False):
        together = np.array(report["coactivation"][-1])
        load = np.diag(together)
        expected, n = np.outer(load, load), len(load)
        if k := report["experts_per_token"]:
            # With equal loads, two given experts are drawn together with probability
            # k (k - 1) / (n (n - 1)).
            expected *= n * (k - 1) / (k * (n - 1))
        ratio = np.where(np.eye(n, dtype=bool), np.nan, together / np.maximum(expected, 1e-9))
        image = axes.imshow(ratio, cmap="PuOr_r", vmin=0, vmax=2)
        axes.set_title(title, loc="left", fontsize=7)
        axes.set_yticks([])
        _without_axes(axes)
    options = {"location": "bottom", "shrink": 0.7, "extend": "max"}
    label = "frequency relative to chance"
    figure.colorbar(image, ax=list(panels.flat), label=label, **options)
    return figure


def save(figure, path):
    """Saves a figure as PATH.png, with a palette of colours, and PATH.svg, both on white.

    Returns:
      An SVG for an HTML page: without a background, with text in the page's colour, without
      numbered ids, and with a flexible width.
    """
    for_page, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(for_page, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
        figure.savefig(png, dpi=DPI, facecolor="white")
    few_colours = Image.open(png).convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE)
    few_colours.save(path.with_suffix(".png"), optimize=True)
    svg = for_page.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace("xlink:href", "href")
    size = r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"'
    return re.sub(size, r'\1 style="max-width:\2pt"', svg, count=1)
