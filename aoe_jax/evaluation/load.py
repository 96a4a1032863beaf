"""Load statistics as a table, as JSON and as a picture like the paper's Fig. 3.

L layers, n experts. All from the `LayerStats` of an evaluation.
"""

import numpy as np
from matplotlib.figure import Figure

from aoe_jax.experts.balance import LayerStats, dead_experts, load_entropy, load_spread
from aoe_jax.experts.kinds import LAYERS


def load_statistics(stats: LayerStats, kind):
    """The statistics of every layer, JSON-ready.

    Args:
      stats: stacked over layers, mean over tokens.
      kind: `experts.kind`; mean scores are norms or, of a router, logits.

    Returns:
      `load` `[L][n]` (fraction of the tokens that choose each expert), `load_entropy` and
      `confidence_entropy` `[L]` in nats, `mean_norm` or `mean_logit` `[L][n]`, `load_spread`,
      `experts_per_token` and `dead_experts` (no token at all); of experts with a capacity also
      `dropped_share` `[L]`, the share of the choices that found no room; where experts are added
      and removed also `live_experts` `[L]`.
    """
    load, live = np.asarray(stats.load), stats.live
    of_some = (
        {}
        if stats.dropped_share is None
        else {"dropped_share": np.asarray(stats.dropped_share).tolist()}
    )
    if live is not None:
        live = np.asarray(live)
        of_some["live_experts"] = (live > 0).sum(axis=-1).tolist()
    return of_some | {
        "load": load.tolist(),
        "load_entropy": np.asarray(load_entropy(load)).tolist(),
        "confidence_entropy": np.asarray(stats.confidence_entropy).tolist(),
        LAYERS[kind].score_name: np.asarray(stats.mean_score).tolist(),
        "load_spread": float(load_spread(load, live)),
        "experts_per_token": float(load.sum(axis=-1).mean()),
        "dead_experts": int(dead_experts(load, live).sum()),
    }


def load_table(statistics):
    """The statistics as lines of text, a row a layer; loads in percent of the layer's total, drops
    of its choices.
    """
    load = np.array(statistics["load"])
    share = load / np.maximum(
        load.sum(axis=1, keepdims=True), 1e-9
    )  # a layer may have no active expert
    dropped = [f"{100 * s:>6.2f}%  " for s in statistics.get("dropped_share", [])]
    head = (
        "layer  Ent_load  Ent_conf  "
        + "dropped  " * bool(dropped)
        + " ".join(f"{f'E{i}':>5}" for i in range(load.shape[1]))
    )
    rows = [
        f"{layer:>5}  {statistics['load_entropy'][layer]:>8.3f}  {statistics['confidence_entropy'][layer]:>8.3f}  "
        + (dropped[layer] if dropped else "")
        + " ".join(f"{100 * s:>4.1f}%" for s in share[layer])
        for layer in range(len(load))
    ]
    foot = (
        f"Ent_load is at most {np.log(load.shape[1]):.3f}; load spread {statistics['load_spread']:.3f}; "
        f"{statistics['experts_per_token']:.2f} experts per token; {statistics['dead_experts']} dead experts"
    )
    return "\n".join([head, *rows, foot])


def draw_load_heatmap(statistics, title):
    """A `Figure`: layers x experts, coloured by share of load, with Ent_load and Ent_conf of each
    layer beside it.

    Numbers are written in its fields as long as they have room, for up to 16 experts and 32 layers.
    """
    load = np.array(statistics["load"])
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9)
    n_layers, n_experts = load.shape
    numbers = n_experts <= 16 and n_layers <= 32
    width, height = min(0.62 * (n_experts + 2), 12), min(0.42 * n_layers, 14)
    figure = Figure(figsize=(2.5 + width, 1.7 + height), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=[n_experts, 1, 1] if numbers else [16, 1, 1])
    names = [f"E{i}" for i in range(n_experts)]
    panels = [
        ("share of load", share, "viridis", (0, max(2 / n_experts, share.max())), names),
        (
            "Ent_load",
            np.array(statistics["load_entropy"])[:, None],
            "Blues",
            (0, np.log(n_experts)),
            [],
        ),
        (
            "Ent_conf",
            np.array(statistics["confidence_entropy"])[:, None],
            "Oranges",
            (0, np.log(n_experts)),
            [],
        ),
    ]
    every_expert, every_layer = -(-n_experts // 16), -(-n_layers // 32)
    for position, (name, values, colours, limits, ticks) in enumerate(panels):
        axes = figure.add_subplot(grid[position])
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
        for row, column in np.ndindex(values.shape) if numbers else ():
            value = values[row, column]
            light = image.norm(value) < 0.5 if colours == "viridis" else image.norm(value) > 0.6
            text = f"{100 * value:.0f}%" if position == 0 else f"{value:.2f}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if light else "black",
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(0, len(ticks), every_expert), ticks[::every_expert], fontsize=8)
        layers = range(0, n_layers, every_layer) if position == 0 else []
        axes.set_yticks(layers, layers, fontsize=8)
        if position == 0:
            axes.set_ylabel("layer", fontsize=9)
            figure.colorbar(
                image, ax=axes, location="left", shrink=0.9, format=lambda v, _: f"{100 * v:.3g}%"
            ).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
