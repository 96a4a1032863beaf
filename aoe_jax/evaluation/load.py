"""Load statistics of experts as JSON, as a table and as a picture like the paper's Fig. 3.

L layers, n experts.
"""

import numpy as np
from matplotlib.figure import Figure

from aoe_jax.moe.balance import LayerStats, dead_experts, load_entropy, load_spread


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
        "Ent_load": [f"{value:.3f}" for value in statistics["load_entropy"]],
        "Ent_conf": [f"{value:.3f}" for value in statistics["confidence_entropy"]],
    }
    if "dropped_share" in statistics:
        columns["dropped"] = [f"{100 * value:.2f}%" for value in statistics["dropped_share"]]
    rows = ["  ".join(["layer", *(f"{name:>8}" for name in columns)])]
    rows[0] += "  " + " ".join(f"{f'E{i}':>5}" for i in range(share.shape[1]))
    for layer, shares in enumerate(share):
        cells = "  ".join([f"{layer:>5}", *(f"{values[layer]:>8}" for values in columns.values())])
        rows.append(f"{cells}  " + " ".join(f"{100 * value:>4.1f}%" for value in shares))
    rows.append(
        f"Ent_load is at most {np.log(share.shape[1]):.3f}; "
        f"load spread {statistics['load_spread']:.3f}; "
        f"{statistics['experts_per_token']:.2f} experts per token; "
        f"{statistics['dead_experts']} dead experts"
    )
    return "\n".join(rows)


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
    numbers = n_experts <= 16 and n_layers <= 32
    width, height = min(0.62 * (n_experts + 2), 12), min(0.42 * n_layers, 14)
    figure = Figure(figsize=(2.5 + width, 1.7 + height), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[n_experts if numbers else 16, 1, 1])
    loads, entropies, confidences = panels
    image = _heatmap(
        loads, share, "viridis", max(2 / n_experts, share.max()), "{:.0%}" if numbers else ""
    )
    bar = figure.colorbar(
        image, ax=loads, location="left", shrink=0.9, format=lambda value, _: f"{100 * value:.3g}%"
    )
    bar.ax.tick_params(labelsize=7)
    of_panels = (
        (entropies, "load_entropy", "Blues"),
        (confidences, "confidence_entropy", "Oranges"),
    )
    for panel, name, colours in of_panels:
        column = np.array(statistics[name])[:, None]
        _heatmap(panel, column, colours, np.log(n_experts), "{:.2f}" if numbers else "")
    for panel, name in zip(panels, ("share of load", "Ent_load", "Ent_conf"), strict=True):
        panel.set_title(name, fontsize=9)
        panel.set(xticks=[], yticks=[])
    experts, layers = (
        range(0, n_experts, -(-n_experts // 16)),
        range(0, n_layers, -(-n_layers // 32)),
    )
    loads.set_xticks(experts, [f"E{i}" for i in experts], fontsize=8)
    loads.set_yticks(layers, layers, fontsize=8)
    loads.set_ylabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _heatmap(axes, values, colours, largest, form):
    """Draws `values [L, columns]` from 0 to `largest`, written as `form` unless that is empty."""
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=largest)
    for (row, column), value in np.ndenumerate(values) if form else ():
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axes.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark else "black",
        )
    return image
