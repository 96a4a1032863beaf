"""Draws the metrics of one or several runs, and defines how all pictures look. They are `WIDTH`
inches wide, so that their text can be read when they are scaled to 400 pixels.
"""

import io
import itertools
import textwrap

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from aoe_jax.storage.files import write_whole

# The colours of Okabe and Ito, distinct for all kinds of colour vision, with grey in place of
# yellow (pale on white) and black (invisible on black).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)), (0, (1, 3)))
WIDTH, DPI = 4.6, 140
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "svg.fonttype": "none",  # text stays text and does not become paths
    "svg.hashsalt": "aoe_jax",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "axes.grid": True,
    "lines.linewidth": 1.6,
}
SMOOTHING = 0.04  # fraction of the steps in the moving average of training losses
# The line that joins the validation losses of a run.
VALIDATION = {"marker": "o", "markersize": 3.5, "markerfacecolor": "white", "linewidth": 0.9}
_MAX_LEGEND = 8  # largest number of layers in a legend

drawn = matplotlib.rc_context(SETTINGS)  # decorator of functions that draw


def styles_of(labels):
    """Returns `{key: options of its lines}` for `{key: label}`; the first seven colours differ."""
    styles = itertools.cycle(itertools.product(DASHES, COLOURS))
    return {
        key: {"color": colour, "linestyle": dashes, "label": label}
        for (key, label), (dashes, colour) in zip(labels.items(), styles, strict=False)
    }


def new_figure(height, n_panels=1, sharex=True):
    """Returns a figure of `height` inches, and its panels from top to bottom."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(n_panels, squeeze=False, sharex=sharex)[:, 0]


def add_legend(figure, axes):
    """Adds a legend below all panels, in the order of the last values of the lines in `axes`."""
    lines, labels = axes.get_legend_handles_labels()
    lines.sort(key=lambda line: line.get_ydata()[-1], reverse=True)
    columns = max(1, int(WIDTH / (0.6 + 0.07 * max(map(len, labels)))))
    figure.legend(handles=lines, loc="outside lower left", ncols=columns, markerscale=0)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(lines) // columns))


def smoothed(values):
    """Returns the moving average of the last values, `[S]` -> `[S]`; NaNs are left out."""
    window = max(1, round(len(values) * SMOOTHING))
    return pd.Series(values).rolling(window, min_periods=1).mean().to_numpy()


@drawn
def draw_runs(runs, title=""):
    """Draws loss, load of experts and speed; `runs` is `{name: lines of its metrics.jsonl}`. Loads
    are those of each layer for a single run, else means over layers.
    """
    styles = styles_of({name: name for name in runs})
    loads = {name: found for name, lines in runs.items() if (found := _loads(lines))}
    figure, panels = new_figure(6.6 if loads else 4.4, 3 if loads else 2)
    _draw_loss(panels[0], runs, styles)
    if loads:
        _draw_load(panels[1], loads, styles)
    for name, lines in runs.items():
        _plot(panels[-1], *_curve(lines, "tokens_per_second"), **styles[name])
    panels[-1].set(title="speed", xlabel="step", ylabel="tokens per second", ylim=(0, None))
    panels[-1].yaxis.set_major_formatter(EngFormatter(sep=""))
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.suptitle(textwrap.fill(title, 52))
    if len(runs) > 1:
        add_legend(figure, panels[0])
    return figure


def _draw_loss(axes, runs, styles):
    late, handles = [], []
    for name, lines in runs.items():
        (steps, nll), points = _curve(lines, "nll"), _curve(lines, "validation_nll")
        axes.plot(steps, nll, color=styles[name]["color"], linewidth=0.8, alpha=0.3)
        handles += _plot(axes, steps, smoothed(nll), **styles[name])
        handles += axes.plot(*points, color=styles[name]["color"], **VALIDATION)
        late += [*nll[len(nll) // 20 :], *points[1]]  # without the steep beginning
    if late:
        margin = max(0.05 * np.ptp(late), 0.01)
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(title="loss", ylabel="nll, nats a token")
    axes.legend(handles[:2], ["training batches, smoothed", "validation split"])


def _draw_load(axes, loads, styles):
    for name, of_run in loads.items():
        steps, ratios = [*of_run], np.array([*of_run.values()], float)  # [S], [S, L]
        if len(styles) > 1:
            _plot(axes, steps, ratios.mean(axis=1), **styles[name] | {"label": None})
            continue
        n_layers = ratios.shape[1]
        labelled = range(0, n_layers, -(-n_layers // _MAX_LEGEND))
        for layer, ratio in enumerate(ratios.T):
            colour = matplotlib.colormaps["viridis"](layer / (1.1 * n_layers))
            label = f"layer {layer}" if layer in labelled else None
            _plot(axes, steps, ratio, color=colour, linewidth=1.2, label=label)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="balanced")
    title = "load of experts" + (", mean over layers" if len(styles) > 1 else "")
    axes.set(title=title, ylabel="largest load / mean load")
    axes.legend(ncols=3)


def _plot(axes, steps, values, **style):
    marker = "o" if len(steps) == 1 else None  # a line through one point would be invisible
    return axes.plot(steps, values, marker=marker, markersize=3.5, **style)


def _curve(lines, name):
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return np.array(found, float).reshape(-1, 2).T


def _loads(lines):
    """Returns `{step: the largest load over the mean of each layer}`."""
    logged = [line for line in lines if isinstance(line.get("layers"), dict)]
    found = ((line["step"], line["layers"].get("load_max_over_mean")) for line in logged)
    return {step: ratios for step, ratios in found if ratios}


def write_png(file, figure):
    """Writes a figure as PNG, on a disk or in an object store."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    write_whole(file, content.getvalue())
