"""Draws `training.png`: the loss of a run, and the load balance of its experts."""

import io
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aoe_jax.storage.files import read_metrics, write_whole

_LATE = 0.05  # the loss axis is scaled to the losses after this fraction of the steps
_MAX_LEGEND = 8  # largest number of layers in a legend


def draw_run(lines, title):
    """Returns a matplotlib `Figure` of the `lines` of a `metrics.jsonl`. It shows the nll and, if
    the model has experts, the largest load of an expert divided by the mean load, for each layer.
    """
    train = [line for line in lines if line.get("nll") is not None]
    validation = [line for line in lines if line.get("validation_nll") is not None]
    loaded = [line for line in train if "load_max_over_mean" in line.get("layers", {})]
    figure = Figure(figsize=(10 if loaded else 5, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes, *others = figure.subplots(1, 2 if loaded else 1, squeeze=False)[0]
    _draw_loss(axes, train, validation)
    for right in others:
        _draw_load(right, loaded)
    return figure


def _draw_loss(axes, train, validation):
    steps, nll = _column(train, "step"), _column(train, "nll")
    points = _column(validation, "step"), _column(validation, "validation_nll")
    _plot(axes, steps, nll, "#0072B2", "training batches")  # colours of Okabe and Ito
    axes.plot(*points, "o-", color="#D55E00", markersize=3.5, label="validation split")
    if len(train) > 1:
        late = np.concatenate([nll[steps >= _LATE * steps[-1]], points[1]])
        margin = max(0.05 * np.ptp(late), 0.01)
        axes.set_ylim(late.min() - margin, late.max() + margin)
    _finish(axes, "loss", "nll, nats a token")


def _draw_load(axes, lines):
    steps = _column(lines, "step")
    ratios = np.array([line["layers"]["load_max_over_mean"] for line in lines], float)  # [steps, L]
    n_layers = ratios.shape[1]
    labelled = range(0, n_layers, -(-n_layers // _MAX_LEGEND))
    for layer, ratio in enumerate(ratios.T):
        colour = colormaps["viridis"](layer / (1.1 * n_layers))
        _plot(axes, steps, ratio, colour, f"layer {layer}" if layer in labelled else None)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    _finish(axes, "load of experts", "largest over mean (1: balanced)")


def _plot(axes, steps, values, colour, label):
    marker = "o" if len(steps) == 1 else None  # a line through one point would be invisible
    style = {"linewidth": 1.2, "marker": marker, "markersize": 3.5}
    axes.plot(steps, values, color=colour, label=label, **style)


def _finish(axes, title, ylabel):
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _column(lines, name):
    return np.array([line[name] for line in lines], float)


def write_picture(metrics: Path, picture: Path, title):
    """Draws the run of a `metrics.jsonl` into a PNG file, on a disk or in an object store."""
    content = io.BytesIO()
    draw_run(list(read_metrics(metrics)), title).savefig(content, dpi=130)
    write_whole(picture, content.getvalue())
