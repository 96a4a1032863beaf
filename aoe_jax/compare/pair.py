"""Compares any two arms of a suite.

    python -m aoe_jax.compare.pair --results=DIR --arms=ARM,ARM

DIR has the `runs.csv` of a report, such as `results/small` or the working directory of a suite. The
table has, for each size, the final validation nll of both arms (nats a token; means and standard
errors over the seeds that both have finished), and the first minus the second with its 95% interval
(Student's t).

Losses of arms that are not causal compare only with each other; the report names these arms.
"""

import io
from pathlib import Path

import pandas as pd
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.statistics import markdown_table, mean
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.storage.files import read_regular

_RESULTS = flags.DEFINE_string("results", None, "a directory with runs.csv, such as results/small")
_ARMS = flags.DEFINE_list(
    "arms", [], "two arms by their names in the suite, such as aoe_d3_free,moe_free"
)

_BYTES = 2**26  # the largest runs.csv


def finished_runs(folder: Path):
    """Returns the rows of `runs.csv` of finished runs. Raises `UserError` if the file is missing,
    damaged or not of a report, or no run has finished.
    """
    file = folder / "runs.csv"
    advice = "name the folder of a report"
    try:
        runs = pd.read_csv(io.BytesIO(read_regular(file, _BYTES)))
    except (OSError, ValueError) as e:  # ValueError: not text, or empty
        reason = getattr(e, "strerror", None) or "it is no table"
        raise UserError(f"--results={folder}: {file} cannot be read ({reason}); {advice}") from e
    is_report = {"size", "arm", "seed", "state", "validation_nll"} <= {*runs.columns} and len(runs)
    require_flag(is_report, "results", folder, f"{file} has no runs of a suite; {advice}")
    finished = runs[runs["state"] == "finished"]
    require_flag(len(finished), "results", folder, f"no run of {file} has finished")
    nlls = pd.to_numeric(finished["validation_nll"], errors="coerce")
    is_whole = nlls.notna().all() and not finished.duplicated(["size", "arm", "seed"]).any()
    require_flag(is_whole, "results", folder, f"{file} is damaged; make the report again")
    return finished.assign(validation_nll=nlls)


def pairs(runs: pd.DataFrame, arms):
    """Compares two arms at every size that both have; raises `UserError` if there is none.

    Returns a frame with a row for each size: `size`; `nlls`, a pair of `Estimate`s; `difference`,
    an `Estimate`.
    """
    given = ",".join(arms)
    are_two = len(arms) == len({*arms}) == 2
    require_flag(are_two, "arms", given, "name two arms, such as aoe_d3_free,moe_free")
    known = runs["arm"].unique()
    for arm in arms:
        wanted = f"{arm} has finished no run there; choose one of {', '.join(known)}"
        require_flag(arm in known, "arms", given, wanted)
    wide = (
        runs[runs["arm"].isin(arms)]
        .pivot(index=["size", "seed"], columns="arm", values="validation_nll")
        .dropna()
    )
    require_flag(len(wide), "arms", given, "no size and seed has both")
    rows = []
    for size in (size for size in runs["size"].unique() if size in wide.index):
        first, second = (wide.loc[size][arm] for arm in arms)
        nlls = mean(first), mean(second)
        rows.append({"size": size, "nlls": nlls, "difference": mean(first - second)})
    return pd.DataFrame(rows)


def table(found: pd.DataFrame, arms):
    rows = []
    for size, nlls, difference in found.itertuples(index=False):
        row = {"size": size} | {arm: nll.text() for arm, nll in zip(arms, nlls, strict=True)}
        row[f"{arms[0]} minus {arms[1]} [95% interval]"] = difference.as_difference()
        rows.append(row | {"seeds": difference.n})
    return pd.DataFrame(rows)


def main():
    folder, arms = cli.path_of(_RESULTS), cli.required(_ARMS)
    print(markdown_table(table(pairs(finished_runs(folder), arms), arms)))


if __name__ == "__main__":
    cli.run(main)
