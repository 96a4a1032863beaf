"""Compares any two arms of a suite.

    python -m aoe_jax.compare.pair --results=DIR --arms=ARM,ARM

DIR has the `runs.csv` of a report, such as `results/small` or the working directory of a suite. The
table has, for each size, the final validation nll of both arms (nats a token; means and standard
errors over the seeds that both have finished), and the first minus the second with its 95% interval
(Student's t).

Losses of arms that are not causal compare only with each other; the report names these arms.
"""

from pathlib import Path

import pandas as pd
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.statistics import markdown_table, mean
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError

_RESULTS = flags.DEFINE_string("results", None, "a directory with runs.csv, such as results/small")
_ARMS = flags.DEFINE_list(
    "arms", [], "two arms by their names in the suite, such as aoe_d3_free,moe_free"
)


def finished_runs(folder: Path):
    """Returns the finished runs of `runs.csv`. Raises `UserError` if the file cannot be read."""
    columns = ["size", "arm", "seed", "state", "validation_nll"]
    try:
        runs = pd.read_csv(folder / "runs.csv", usecols=columns, dtype={"validation_nll": float})
    except (OSError, ValueError) as e:  # ValueError: not text, other columns, or no numbers
        reason = getattr(e, "strerror", None) or f"it has no runs of a suite: {e}"
        advice = "name the folder of a report"
        raise UserError(f"--results={folder}: runs.csv cannot be read ({reason}); {advice}") from e
    return runs[runs["state"] == "finished"].dropna()


def pairs(runs: pd.DataFrame, arms):
    """Compares two arms at every size that both have; raises `UserError` if there is none.

    Returns `[(size, (Estimate, Estimate), Estimate of the difference)]`.
    """
    known = runs["arm"].unique()
    are_two = len({*arms} & {*known}) == len(arms) == 2
    wanted = f"name two arms with finished runs, of {', '.join(known)}"
    require_flag(are_two, "arms", ",".join(arms), wanted)
    of_both = runs[runs["arm"].isin(arms)]
    wide = of_both.pivot_table("validation_nll", ["size", "seed"], "arm").dropna()
    require_flag(len(wide), "arms", ",".join(arms), "no size and seed has both")
    found = []
    for size in (size for size in runs["size"].unique() if size in wide.index):
        first, second = (wide.loc[size][arm] for arm in arms)
        found.append((size, (mean(first), mean(second)), mean(first - second)))
    return found


def main():
    folder, arms = cli.path_of(_RESULTS), cli.required(_ARMS)
    rows = []
    for size, nlls, difference in pairs(finished_runs(folder), arms):
        row = {"size": size} | {arm: nll.text() for arm, nll in zip(arms, nlls, strict=True)}
        row[f"{arms[0]} minus {arms[1]} [95% interval]"] = difference.as_difference()
        rows.append(row | {"seeds": difference.n})
    print(markdown_table(rows))


if __name__ == "__main__":
    cli.run(main)
