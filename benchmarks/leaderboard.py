"""Writes the tables and pictures of the leaderboard from the `runs.csv` of its report.

`python -m benchmarks.leaderboard --folder=results/leaderboard`. For each size it writes
`entries_SIZE.csv`, the table of README.md between the lines `<!-- SIZE -->` and `<!-- end -->`, and
`figures/entries_SIZE.png`. An entry is an arm that has finished at least two runs.

Differences are paired by seed. `p` is corrected by Holm over the entries of a size. `share` is the
share of the way from the frozen router (0) to the MoE (1), with the central 95% of 2,000 bootstrap
resamples of the seeds that the entry, the MoE and the frozen router have in common, if at least 8.
`later` is the difference in the seeds from 12 on, with its interval and its uncorrected p-value:
the first 12 seeds choose the entries that get more.
"""

import numpy as np
import pandas as pd
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.pictures import save
from aoe_jax.compare.statistics import holm, markdown_table, mean
from aoe_jax.config.checks import require_flag
from aoe_jax.training.picture import COLOURS, drawn, new_figure
from benchmarks.timing import run_benchmark
from configs.compare.leaderboard import get_suite

_FOLDER = flags.DEFINE_string("folder", None, "folder with runs.csv and README.md")

MOE, FROZEN = "moe", "frozen"
FIRST_SEEDS = 12  # of every entry; some get more
FLOORS = ("dense", "dense_active", "frozen", "hash", "self_routing")
FAMILIES = {  # name in the legend -> colour
    "AoE: experts choose themselves": COLOURS[1],
    "MoE: a router chooses": COLOURS[0],
    "nothing chooses, or nothing learns to": COLOURS[6],
}


def share_of_the_way(nlls, arm):
    """Returns `(share, low, high)` of an arm; NaN without the frozen router."""
    if FROZEN not in nlls or MOE not in nlls:
        return (np.nan,) * 3
    found = nlls[[FROZEN, MOE, arm]].dropna().to_numpy()
    if len(found) < 8:  # too few for a bootstrap
        return (np.nan,) * 3
    draws = np.random.default_rng(0).integers(0, len(found), (2000, len(found)))
    frozen, moe, own = np.concatenate([found.mean(axis=0)[None], found[draws].mean(axis=1)]).T
    shares = (frozen - own) / (frozen - moe)
    return shares[0], *np.quantile(shares[1:], [0.025, 0.975])


def entries_of(runs, labels):
    """Returns a row for each entry of a size, ordered by the difference from the MoE."""
    nlls = runs.pivot_table("validation_nll", "seed", "arm")
    means, rows = runs.groupby("arm").mean(numeric_only=True), []
    for arm in nlls:
        difference, of_arm = mean(nlls[arm] - nlls[MOE]), means.loc[arm]
        if nlls[arm].count() < 2:
            continue
        later = mean((nlls[arm] - nlls[MOE])[nlls.index >= FIRST_SEEDS])
        share, share_low, share_high = share_of_the_way(nlls, arm)
        rows.append(
            {
                "arm": arm,
                "label": labels.get(arm, arm),
                "nll": nlls[arm].mean(),
                "difference": difference.value if arm != MOE else 0.0,
                "low": difference.low,
                "high": difference.high,
                "p": difference.p,
                "share": share,
                "share_low": share_low,
                "share_high": share_high,
                "bits_per_byte": of_arm["validation_bits_per_byte"],
                "load_violation": of_arm["max_violation"],
                "experts": of_arm["experts_per_token"],
                "time": of_arm["seconds_per_step"] / means.loc[MOE, "seconds_per_step"],
                "flops": of_arm["flops_per_token"] / means.loc[MOE, "flops_per_token"],
                "seeds": nlls[arm].count(),
                "later": later.value,
                "later_low": later.low,
                "later_high": later.high,
                "later_p": later.p,
            }
        )
    found = pd.DataFrame(rows).sort_values("difference", ignore_index=True)
    found.insert(7, "p_holm", holm(found["p"]))
    return found


def table(entries):
    """Formats the entries as Markdown."""
    rows = []
    for e in entries.itertuples():
        interval = f"{e.difference:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
        rows.append(
            {
                "entry": e.label,
                "nll": f"{e.nll:.3f}",
                "minus the MoE's [95%]": interval if e.arm != MOE else "",
                "p": f"{e.p_holm:.2g}" if e.arm != MOE else "",
                "bits/byte": f"{e.bits_per_byte:.3f}",
                "load": "" if np.isnan(e.load_violation) else f"{e.load_violation:.2f}",
                "experts": "" if np.isnan(e.experts) else f"{e.experts:.2f}",
                "time": f"{e.time:.2f}",
                "FLOPs": f"{e.flops:.2f}",
                "seeds": e.seeds,
            }
        )
    return markdown_table(rows)


@drawn
def picture(entries):
    """Draws the differences up to 0.15 with their intervals, the best entry at the top."""
    entries = entries[entries["difference"] < 0.15]  # so that small differences are seen
    (figure, (axes,)), seen = new_figure(1.3 + 0.19 * len(entries)), set()
    for y, e in enumerate(entries[::-1].itertuples()):
        aoe, moe, floor = FAMILIES
        name = floor if e.arm in FLOORS else aoe if e.label.startswith("AoE") else moe
        reach = [[e.difference - e.low], [e.high - e.difference]] if e.arm != MOE else None
        label = None if name in seen else name
        seen.add(name)
        axes.errorbar(
            e.difference, y, xerr=reach, fmt="o", markersize=4, color=FAMILIES[name], label=label
        )
    axes.axvline(0, color=COLOURS[0], linewidth=0.8)
    labels = entries["label"].str.removesuffix(", Muon")  # the optimiser unless it is named
    axes.set_yticks(range(len(entries)), labels[::-1], fontsize=7)
    axes.set_ylim(-0.7, len(entries) - 0.3)
    reach = entries["difference"].agg(["min", "max"])
    axes.set_xlim(reach["min"] - 0.03, reach["max"] + 0.03)  # wider intervals are cut
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("nats above the MoE")
    figure.legend(loc="outside lower left")
    return figure


def main():
    folder, labels = cli.path_of(_FOLDER), {a: arm.label for a, arm in get_suite().arms.items()}
    file = folder / "runs.csv"
    require_flag(file.is_file(), "folder", folder, "has no runs.csv; name the folder of a report")
    runs = pd.read_csv(file)
    runs = runs[runs["state"] == "finished"]
    readme = folder / "README.md"
    page = readme.read_text() if readme.exists() else ""
    for size, of_size in runs.groupby("size", sort=False):
        if of_size["arm"].value_counts().max() < 2:  # no entry has an interval
            continue
        entries = entries_of(of_size, labels)
        entries.to_csv(folder / f"entries_{size}.csv", index=False)
        save(picture(entries), folder / f"figures/entries_{size}.png")
        print(f"{size}\n{table(entries)}\n")
        begin, end = f"<!-- {size} -->\n", "<!-- end -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}{table(entries)}\n{end}{after}"
    if page:
        readme.write_text(page)


if __name__ == "__main__":
    run_benchmark(main)
