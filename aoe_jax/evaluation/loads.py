"""Reports the load of experts as JSON values, a table, and a picture like the paper's Fig. 3.

Shapes have L layers and n experts. `load` is the share of tokens routed to each expert.
"""

import numpy as np
from tabulate import tabulate

from aoe_jax.moe.load_balance import LayerStats, layer_statistics, load_spread

MAX_NUMBERS = 16  # with more experts, a picture shows colours but no numbers


def load_statistics(stats: LayerStats):
    """Returns the load statistics of all layers as JSON values; `stats` are stacked over layers.

    The dictionary has `load` `[L][n]`, `load_entropy` and `confidence_entropy` `[L]` in nats,
    `mean_score` `[L][n]` (norms or logits), and one number for all layers: `load_spread`,
    `experts_per_token` and `dead_experts` (the number of experts that no token chooses). Some
    methods add `dropped_share` `[L]` (the share of choices that are dropped) and `live_experts`.
    """
    load, live = np.asarray(stats.load), stats.live
    of_layers = layer_statistics(load, live)
    names = ("load", "confidence_entropy", "mean_score", "dropped_share")
    found = {name: getattr(stats, name) for name in names}
    found |= {name: of_layers.get(name) for name in ("load_entropy", "live_experts")}
    lists = {name: np.asarray(a).tolist() for name, a in found.items() if a is not None}
    return lists | {
        "load_spread": float(load_spread(load, live)),
        "experts_per_token": float(load.sum(axis=-1).mean()),
        "dead_experts": int(of_layers["dead_experts"].sum()),
    }


def load_table(statistics):
    """Formats the statistics, one row per layer, with load shares and dropped choices in %."""
    share = _share(statistics)
    columns = {"layer": range(len(share)), "Ent_load": statistics["load_entropy"]}
    columns["Ent_conf"] = statistics["confidence_entropy"]
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
    """Returns each expert's share of its layer's load, `[L, n]`."""
    load = np.array(statistics["load"])
    return load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9)  # an inactive layer has load 0


def draw_loads(panels):
    """Draws load shares, with Ent_load and Ent_conf at the right, like the paper's Fig. 3. Returns
    a matplotlib `Figure`. `panels` maps titles to results of `load_statistics`.
    """
    from aoe_jax.training.picture import new_figure  # slow to import

    height = 0.95 + 0.24 * max(len(s["load"]) for s in panels.values())
    figure, rows = new_figure(height * len(panels), len(panels), sharex=False)
    for axes, (title, statistics) in zip(rows, panels.items(), strict=True):
        share, options = _share(statistics), {"va": "center", "fontsize": 7}
        n = share.shape[1]
        axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=2 / n)
        for (row, column), value in np.ndenumerate(share) if n <= MAX_NUMBERS else ():
            colour = "white" if value < 1 / n else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", color=colour, **options)
        of_load, of_choice = statistics["load_entropy"], statistics["confidence_entropy"]
        for row, pair in enumerate(zip(of_load, of_choice, strict=True)):
            axes.text(1.02 * n - 0.5, row, "{:.2f}  {:.2f}".format(*pair), **options)
        means = f"means {np.mean(of_load):.3f} and {np.mean(of_choice):.3f}"
        means = f"right: Ent_load and Ent_conf in nats, {means}"
        axes.set_title(f"{title}\n{means}", loc="left", fontsize=8)
        axes.set_yticks(range(len(share)), [f"layer {i}" for i in range(len(share))], fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel(f"expert (share of the load in %; colours: 0 to {200 / n:.3g})", fontsize=8)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure
