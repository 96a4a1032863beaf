"""Compares any two arms of a suite.

    python -m aoe_jax.compare.pair --results=DIR --arms=ARM,ARM

DIR has the `runs.csv` of a report, such as `results/small` or the working directory of a suite. The
table has, for each size, the final validation nll of both arms (nats a token; means and standard
errors over the seeds that both have finished), and the first minus the second with its 95% interval
(Student's t). The last columns are the exponents of a power law in active parameters without
embeddings from the previous size to this one, without an interval. They are a dash between sizes
whose parameters or training FLOPs are about equal.

Losses of arms that are not causal compare only with each other; the report names these arms.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.statistics import ABOUT_EQUAL, markdown_table, mean
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_regular

_RESULTS = flags.DEFINE_string("results", None, "a directory with runs.csv, such as results/small")
_ARMS = flags.DEFINE_list(
    "arms", [], "two arms by their names in the suite, such as aoe_d3_free,moe_free"
)

_BYTES = 2**26  # the largest runs.csv
NUMBERS = ["active_non_embedding", "flops", "validation_nll"]


def finished_runs(folder: Path):
    """Returns the rows of `runs.csv` of finished runs, with floats in the columns NUMBERS. Raises
    `UserError` if the file is missing, damaged or not of a report, or no run has finished.
    """
    file = folder / "runs.csv"
    advice = "name the folder of a report"
    try:
        runs = pd.read_csv(io.BytesIO(read_regular(file, _BYTES)))
    except (OSError, ValueError) as e:  # ValueError: not text, or empty
        reason = getattr(e, "strerror", None) or "it is no table"
        raise UserError(f"--results={folder}: {file} cannot be read ({reason}); {advice}") from e
    is_report = {"size", "arm", "seed", "state", *NUMBERS} <= {*runs.columns} and len(runs)
    require_flag(is_report, "results", folder, f"{file} has no runs of a suite; {advice}")
    finished = runs[runs["state"] == "finished"]
    require_flag(len(finished), "results", folder, f"no run of {file} has finished")
    numbers = finished[NUMBERS].apply(pd.to_numeric, errors="coerce")
    is_whole = numbers.notna().all(axis=None)
    is_whole &= not finished.duplicated(["size", "arm", "seed"]).any()
    require_flag(is_whole, "results", folder, f"{file} is damaged; make the report again")
    return finished.assign(**numbers)


def pairs(runs: pd.DataFrame, arms):
    """Compares two arms at every size that both have; raises `UserError` if there is none.

    Returns a frame with a row for each size: `size`; `nlls`, a pair of `Estimate`s; `difference`,
    an `Estimate`; `exponents`, a pair of floats, NaN at the first size and between sizes whose
    parameters or training FLOPs are about equal.
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
        .pivot(index=["size", "seed"], columns="arm", values=NUMBERS)
        .dropna()
    )
    require_flag(len(wide), "arms", given, "no size and seed has both")
    sizes = [size for size in runs["size"].unique() if size in wide.index]
    steps = np.log(wide.groupby("size").mean().loc[sizes]).diff()
    parameters, flops, nll = (steps[name][arms] for name in NUMBERS)
    same = (parameters.abs() < np.log(ABOUT_EQUAL)) | (flops.abs() < np.log(ABOUT_EQUAL))
    exponents = -nll.div(parameters).mask(same)  # a of nll ~ parameters ** -a
    rows = []
    for size in sizes:
        first, second = (wide["validation_nll"].loc[size][arm] for arm in arms)
        nlls, own = (mean(first), mean(second)), exponents.loc[size].to_numpy()
        rows.append(
            {"size": size, "nlls": nlls, "difference": mean(first - second), "exponents": own}
        )
    return pd.DataFrame(rows)


def table(found: pd.DataFrame, arms):
    rows = []
    for size, nlls, difference, exponents in found.itertuples(index=False):
        row = {"size": size} | {arm: nll.text() for arm, nll in zip(arms, nlls, strict=True)}
        row[f"{arms[0]} minus {arms[1]} [95% interval]"] = difference.as_difference()
        row["seeds"] = difference.n
        for arm, a in zip(arms, exponents, strict=True):
            text = "-" if np.isnan(a) else f"{a:.3f}"
            row[f"exponent from the previous size, {arm}"] = text
        rows.append(row)
    return pd.DataFrame(rows)


def main():
    folder, arms = cli.path_of(_RESULTS), cli.required(_ARMS)
    print(markdown_table(table(pairs(finished_runs(folder), arms), arms)))


if __name__ == "__main__":
    cli.run(main)
