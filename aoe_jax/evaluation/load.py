"""Load statistics of experts as JSON, as a table and as a picture like the paper's Fig. 3.

L layers, n experts.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tabulate import tabulate

from aoe_jax.load_figures import dead_experts, load_entropy, load_spread
from aoe_jax.moe.balance import LayerStats


def load_statistics(stats: LayerStats):
    """The statistics of every layer as JSON values.

    Args:
      stats: stacked over layers, mean over tokens.

    Returns:
      A dictionary: `load` `[L][n]` (fraction of the tokens that choose each expert),
      `load_entropy` and `confidence_entropy` `[L]` in nats, `mean_score` `[L][n]` (norms or
      logits), and over all layers `load_spread`, `experts_per_token` and `dead_experts` (chosen by
      no token). Experts with a capacity also have `dropped_share` `[L]`, the share of the choices
      beyond it; experts that are added and removed have `live_experts` `[L]`.
    """
    load, live = np.asarray(stats.load), stats.live
    statistics = {
        "load": load.tolist(),
        "load_entropy": np.asarray(load_entropy(load)).tolist(),
        "confidence_entropy": np.asarray(stats.confidence_entropy).tolist(),
        "mean_score": np.asarray(stats.mean_score).tolist(),
        "load_spread": float(load_spread(load, live)),
        "experts_per_token": float(load.sum(axis=-1).mean()),
        "dead_experts": int(dead_experts(load, live).sum()),
    }
    if stats.dropped_share is not None:
        statistics["dropped_share"] = np.asarray(stats.dropped_share).tolist()
    if live is not None:
        statistics["live_experts"] = (np.asarray(live) > 0).sum(axis=-1).tolist()
    return statistics


def load_table(statistics):
    """The statistics as lines of text, a row a layer.

    Loads are in percent of the layer's total, drops in percent of its choices.
    """
    share = _share(statistics)
    columns = {
        "layer": range(len(share)),
        "Ent_load": statistics["load_entropy"],
        "Ent_conf": statistics["confidence_entropy"],
    }
    if "dropped_share" in statistics:
        columns["dropped"] = statistics["dropped_share"]
    columns |= {f"E{i}": of_expert for i, of_expert in enumerate(share.T)}
    formats = {"Ent_load": ".3f", "Ent_conf": ".3f", "dropped": ".2%"}
    formats = [formats.get(name, ".1%") for name in columns]
    return (
        f"{tabulate(columns, 'keys', 'plain', floatfmt=formats)}\n"
        f"Ent_load is at most {np.log(share.shape[1]):.3f}; "
        f"load spread {statistics['load_spread']:.3f}; "
        f"{statistics['experts_per_token']:.2f} experts per token; "
        f"{statistics['dead_experts']} dead experts"
    )


def _share(statistics):
    """`[L, n]`, each expert's share of its layer's load."""
    load = np.array(statistics["load"])
    return load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9)  # a layer may be inactive


def draw_load_heatmap(statistics, title):
    """A `Figure` of layers x experts, coloured by share of load, with both entropies beside it.

    Fields have numbers for up to 16 experts and 32 layers.
    """
    share = _share(statistics)
    n_layers, n_experts = share.shape
    has_numbers, largest = n_experts <= 16 and n_layers <= 32, np.log(n_experts)
    width, height = min(0.62 * (n_experts + 2), 12), min(0.42 * n_layers, 14)
    figure = Figure(figsize=(2.5 + width, 1.7 + height), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[n_experts if has_numbers else 16, 1, 1])
    contents = {
        "share of load": (share, "viridis", max(2 / n_experts, share.max()), ".0%"),
        "Ent_load": (statistics["load_entropy"], "Blues", largest, ".2f"),
        "Ent_conf": (statistics["confidence_entropy"], "Oranges", largest, ".2f"),
    }
    for axes, (name, (values, colours, vmax, form)) in zip(panels, contents.items(), strict=True):
        values = np.reshape(values, (n_layers, -1))
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=vmax)
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[], yticks=[])
        for (row, column), value in np.ndenumerate(values) if has_numbers else ():
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            text = axes.text(column, row, format(value, form), color=colour, fontsize=8)
            text.set(ha="center", va="center")
    loads = panels[0]
    bar = figure.colorbar(
        loads.images[0], ax=loads, location="left", shrink=0.9, format=PercentFormatter(1)
    )
    bar.ax.tick_params(labelsize=7)
    experts = range(0, n_experts, -(-n_experts // 16))
    layers = range(0, n_layers, -(-n_layers // 32))
    loads.set_xticks(experts, [f"E{i}" for i in experts], fontsize=8)
    loads.set_yticks(layers, layers, fontsize=8)
    loads.set_ylabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
