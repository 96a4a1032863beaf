"""The figures of routing: load, norms, and how early choices settle. Each function returns a
`Figure`.

L layers, n experts. `routing` is what a run's `routing.json` holds.
"""

import numpy as np

from aoe_jax.compare import style
from aoe_jax.compare.figures import drawn

MAX_LAYERS = 4  # of which norms are drawn
MAX_KEY = 16  # experts that are told apart by a key


@drawn
def load_heatmaps(entries):
    """The shares of load with both entropies (the paper's Fig. 3), a panel for each of `entries`
    `[(title, routing)]`.
    """
    layers = max(len(routing["checkpoints"][-1]["load"]) for _, routing in entries)
    figure, panels = style.new_figure(len(entries) * (0.65 + 0.24 * layers), len(entries), 1)
    for axes, (title, routing) in zip(panels[:, 0], entries, strict=True):
        last = routing["checkpoints"][-1]
        load = np.array(last["load"])
        share, n = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9), load.shape[1]
        image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=2 / n)
        for row, column in np.ndindex(share.shape) if n <= 16 else ():
            light = image.norm(share[row, column]) < 0.5
            text = f"{100 * share[row, column]:.0f}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if light else "black",
            )
        for row, (of_load, of_choice) in enumerate(
            zip(last["load_entropy"], last["confidence_entropy"], strict=True)
        ):
            axes.text(n - 0.3, row, f"{of_load:.2f}  {of_choice:.2f}", va="center", fontsize=7)
        means = f"mean Ent_load {np.mean(last['load_entropy']):.3f}, Ent_conf {np.mean(last['confidence_entropy']):.3f}"
        axes.set_title(f"{title}\n{means}", loc="left", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks(range(len(share)), [f"layer {i}" for i in range(len(share))], fontsize=7)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


def some_layers(n_layers):
    """Which layers `scores_through_training` draws."""
    return np.unique(np.linspace(0, n_layers - 1, min(n_layers, MAX_LAYERS)).round().astype(int))


@drawn
def scores_through_training(routing, what, label):
    """The mean norm (or logit) of every expert at each checkpoint of an arm, a panel a layer (the
    paper's Fig. 4).
    """
    steps = [checkpoint["step"] for checkpoint in routing["checkpoints"]]
    scores = np.array(
        [checkpoint["mean_score"] for checkpoint in routing["checkpoints"]]
    )  # [checkpoints, L, n]
    layers = some_layers(scores.shape[1])
    figure, panels = style.new_figure(0.6 + 1.35 * len(layers), len(layers), 1, sharex=True)
    for axes, layer in zip(panels[:, 0], layers, strict=True):
        for expert in range(scores.shape[2]):
            colour = style.COLOURS[expert % len(style.COLOURS)]
            dash = style.DASHES[expert // len(style.COLOURS) % len(style.DASHES)]
            axes.plot(
                steps,
                scores[:, layer, expert],
                color=colour,
                linestyle=dash,
                linewidth=1.1,
                marker=".",
                markersize=3,
            )
        axes.set_title(f"layer {layer}", loc="left", fontsize=8)
        axes.set_ylabel(f"mean {what}")
    panels[-1, 0].set_xlabel("step")
    figure.suptitle(label, x=0.02, ha="left", fontsize=9)
    if scores.shape[2] <= MAX_KEY:
        options = {
            "title": "expert",
            "title_fontsize": 8,
            "fontsize": 8,
            "frameon": False,
            "handlelength": 1.6,
        }
        figure.legend(
            panels[0, 0].lines, range(scores.shape[2]), loc="outside right upper", **options
        )
    return figure


def common_steps(routings):
    """The steps that all runs have kept a checkpoint of, in order."""
    return sorted(
        set.intersection(*({c["step"] for c in routing["checkpoints"]} for routing in routings))
    )


@drawn
def through_training(runs, labels, styles, name, ylabel):
    """A figure of `routing.json`'s checkpoints, mean over layers and seeds, against the share of
    the training.

    `runs`: `{arm: [routing, ...]}`; `name`: of a list over layers.
    """
    figure, ((axes,),) = style.new_figure(style.height_for(len(runs), 2.8))
    ends = []
    for arm, routings in runs.items():
        steps = np.array(common_steps(routings))
        kept = [[c for c in routing["checkpoints"] if c["step"] in steps] for routing in routings]
        values = np.mean([[np.mean(c[name]) for c in checkpoints] for checkpoints in kept], axis=0)
        axes.plot(100 * steps / steps[-1], values, marker="o", markersize=3, **styles[arm])
        ends.append((values[-1], labels[arm], styles[arm]))
    axes.set(xlabel="share of the training, %", ylabel=ylabel)
    if not any(line.get_ydata().any() for line in axes.lines):  # such as no dead experts at all
        axes.set_ylim(0, 1)
    figure.draw_without_rendering()
    style.label_ends(axes, ends)
    return figure


@drawn
def coactivation(entries):
    """How often two experts are chosen together, over what chance would give with the same loads:
    `[(title, routing)]`.

    Of the last layer; where every token has k experts, more than one, chance draws k different
    ones, else each by itself.
    """
    figure, panels = style.new_figure(1.1 + 1.9 * -(-len(entries) // 2), -(-len(entries) // 2), 2)
    for axes in panels.flat[len(entries) :]:
        axes.set_visible(False)
    for axes, (title, routing) in zip(panels.flat, entries, strict=False):
        together = np.array(routing["coactivation"][-1])
        load = np.diag(together)
        expected, n = np.outer(load, load), len(load)
        if k := routing["experts_per_token"]:
            # Drawing k of n with equal loads, two given experts come together with k (k - 1) / (n
            # (n - 1)).
            expected *= n * (k - 1) / (k * (n - 1))
        ratio = np.where(np.eye(n, dtype=bool), np.nan, together / np.maximum(expected, 1e-9))
        image = axes.imshow(ratio, cmap="PuOr_r", vmin=0, vmax=2)
        axes.set_title(title, loc="left", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
    figure.colorbar(
        image,
        ax=list(panels.flat),
        location="bottom",
        shrink=0.7,
        label="times as often as by chance",
        extend="max",
    )
    return figure
