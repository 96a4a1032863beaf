"""Computes the difference of any two arms of a suite from the `runs.csv` of its report."""

from pathlib import Path

import pandas as pd

from aoe_jax.compare.statistics import markdown_table, mean
from aoe_jax.config.checks import did_you_mean, require_flag
from aoe_jax.errors import UserError


def pair_table(folder: Path, arms):
    """Formats a Markdown table of the final validation nll of two arms at every size.

    Nll is in nats per token. Means and differences are over the seeds that both arms have finished;
    `p` is the uncorrected p-value of the paired t-test. Raises `UserError` if the file cannot be
    read, or if the arms have no size and seed in common.
    """
    columns = ["size", "arm", "seed", "state", "validation_nll"]
    try:
        runs = pd.read_csv(folder / "runs.csv", usecols=columns, dtype={"validation_nll": float})
    except (OSError, ValueError) as e:  # ValueError: the content is wrong
        reason = getattr(e, "strerror", None) or f"it has no runs of a suite: {e}"
        wanted = f"runs.csv cannot be read ({reason}); name the folder of a report"
        raise UserError(f"--workdir={folder}: {wanted}") from e
    runs = runs[runs["state"] == "finished"].dropna()
    known = runs["arm"].unique()
    are_two = len({*arms} & {*known}) == len(arms) == 2
    wanted = f"name two of the finished arms: {', '.join(known)}"
    wanted += "".join(did_you_mean(arm, known) for arm in arms if arm not in known)
    require_flag(are_two, "arms", ",".join(arms), wanted)
    of_both = runs[runs["arm"].isin(arms)]
    nlls = of_both.pivot_table("validation_nll", ["size", "seed"], "arm").dropna()
    require_flag(len(nlls), "arms", ",".join(arms), "no size and seed has finished runs of both")
    rows = []
    for size in (size for size in runs["size"].unique() if size in nlls.index):
        first, second = (nlls.loc[size][arm] for arm in arms)
        row = {"size": size, arms[0]: mean(first).text(), arms[1]: mean(second).text()}
        difference = mean(first - second)
        row[f"{arms[0]} minus {arms[1]} [95% interval]"] = difference.as_difference()
        rows.append(row | {"p": f"{difference.p:.2g}", "seeds": difference.n})
    return markdown_table(rows)
