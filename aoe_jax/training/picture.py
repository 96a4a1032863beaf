"""The picture of a run, `training.png`: its loss, and how evenly its experts are loaded."""

import io
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aoe_jax.storage.files import read_metrics, write_whole

_LATE = 0.05  # the panel shows all losses after this share of the steps, not the steep beginning
_MAX_LEGEND = 8  # layers that a legend names; for more, a bar shows the colours
_TRAIN, _VALIDATION = "#0072B2", "#D55E00"  # colours of Okabe and Ito


def draw_run(lines, title):
    """A matplotlib `Figure` of the `lines` of a `metrics.jsonl`: the nll over steps and, except for
    a dense model, the largest load of an expert over the mean load, by layer.
    """
    train = [line for line in lines if line.get("nll") is not None]
    validation = [line for line in lines if line.get("validation_nll") is not None]
    loaded = [line for line in train if "load_max_over_mean" in line.get("layers", {})]
    figure = Figure(figsize=(10 if loaded else 5, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes, *others = figure.subplots(1, 2 if loaded else 1, squeeze=False)[0]
    _draw_loss(axes, train, validation)
    for right in others:
        _draw_load(figure, right, loaded)
    for each in figure.axes:
        each.tick_params(labelsize=8)
    return figure


def _draw_loss(axes, train, validation):
    steps, nll = _column(train, "step"), _column(train, "nll")
    style = {"color": _TRAIN, "linewidth": 1.2, "label": "training batches"}
    axes.plot(steps, nll, **style, **_marker(steps))
    points = _column(validation, "step"), _column(validation, "validation_nll")
    axes.plot(*points, "o-", color=_VALIDATION, markersize=3.5, label="validation split")
    if len(train) > 1:
        late = np.concatenate([nll[steps >= _LATE * steps[-1]], points[1]])
        margin = max(0.05 * np.ptp(late), 0.01)
        axes.set_ylim(late.min() - margin, late.max() + margin)
    _finish(axes, "loss", "nll, nats a token")
    axes.legend(fontsize=8, frameon=False)


def _draw_load(figure, axes, lines):
    steps = _column(lines, "step")
    ratios = np.array([line["layers"]["load_max_over_mean"] for line in lines], float)  # [steps, L]
    n_layers = ratios.shape[1]
    colours = ScalarMappable(Normalize(0, 1.1 * max(n_layers - 1, 1)), "viridis")
    for layer, ratio in enumerate(ratios.T):
        style = {"color": colours.to_rgba(layer), "linewidth": 1.2, "label": f"layer {layer}"}
        axes.plot(steps, ratio, **style, **_marker(steps))
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    _finish(axes, "load of experts", "largest over mean (1: balanced)")
    if n_layers > _MAX_LEGEND:
        shades = figure.colorbar(colours, ax=axes).ax
        shades.set_ylim(0, n_layers - 1)
        shades.set_ylabel("layer", fontsize=8)
    else:
        axes.legend(fontsize=8, frameon=False)


def _marker(steps):
    """The style of a point, if it is the only one: a line through it would not be seen."""
    return {"marker": "o", "markersize": 3.5} if len(steps) == 1 else {}


def _finish(axes, title, ylabel):
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
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
