"""Any two arms of a suite, seed by seed: `python -m aoe_jax.compare.pair --results=DIR
--arms=ARM,ARM`.

DIR has the `runs.csv` of a report, such as `results/small` or the working directory of a suite.
Prints, for each size, the final validation nll of both (nats a token; means and standard errors
over the seeds that both have finished) and the first less the second with its 95% interval
(Student's t); and how fast each falls from one such size to the next, as the exponent of a power
law in active parameters without embeddings, without an interval (a dash between sizes of equal
training FLOPs, which spend them on parameters or on tokens). The report of a suite has the
differences to its baseline, and says which arms aren't causal, whose losses compare with each
other's at most.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.analysis import EQUAL_FLOPS
from aoe_jax.compare.document import Table, to_markdown
from aoe_jax.compare.statistics import Difference, Mean, mean, paired_difference
from aoe_jax.compare.words import plus_minus, signed
from aoe_jax.errors import UserError

_RESULTS = flags.DEFINE_string("results", None, "a directory with runs.csv, such as results/small")
_ARMS = flags.DEFINE_list(
    "arms", [], "two arms by their names in the suite, such as aoe_d3_free,moe_free"
)


NUMBERS = ("active_non_embedding", "flops", "validation_nll")


@dataclass(frozen=True)
class Pair:
    """Two arms at a size."""

    size: str
    nlls: tuple[Mean, Mean]
    difference: Difference  # the first less the second
    active: tuple[float, float]  # parameters without embeddings
    flops: tuple[float, float]  # of the whole training


def finished_runs(folder: Path):
    """The rows of `runs.csv` of runs that have finished, names to words, those of `NUMBERS` to
    numbers.

    Raises:
      UserError: there is no such file, it isn't that of a report, or nothing has finished.
    """
    file = folder / "runs.csv"
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is no text"
        raise UserError(
            f"--results={folder}: {file} can't be read ({reason}); name the folder of a report"
        ) from e
    needed = {"size", "arm", "seed", "state", *NUMBERS}
    if not rows or not needed <= rows[0].keys():
        raise UserError(
            f"--results={folder}: {file} has no runs of a suite; name the folder of a report"
        )
    finished = [row for row in rows if row["state"] == "finished"]
    try:
        finished = [row | {name: float(row[name]) for name in NUMBERS} for row in finished]
    except (TypeError, ValueError) as e:
        raise UserError(
            f"--results={folder}: {file} is damaged ({e}); make the report again"
        ) from e
    if not finished:
        raise UserError(f"--results={folder}: no run of {file} has finished")
    return finished


def pairs(rows, arms):
    """The `Pair` of two arms at every size that both have, in the order of the rows.

    Raises:
      UserError: they aren't two, or have no run in common.
    """
    given = f"--arms={','.join(arms)}"
    if len(arms) != 2 or arms[0] == arms[1]:
        raise UserError(f"{given}: name two arms, such as aoe_d3_free,moe_free")
    known = dict.fromkeys(row["arm"] for row in rows)
    for arm in arms:
        if arm not in known:
            raise UserError(
                f"{given}: {arm} has finished no run there; choose of {', '.join(known)}"
            )
    found = []
    for size in dict.fromkeys(row["size"] for row in rows):
        there = [[row for row in rows if (row["size"], row["arm"]) == (size, arm)] for arm in arms]
        nlls = [{row["seed"]: row["validation_nll"] for row in of_arm} for of_arm in there]
        both = nlls[0].keys() & nlls[1].keys()
        if both:
            means = tuple(mean(of_arm[seed] for seed in sorted(both)) for of_arm in nlls)
            active, flops = (tuple(of_arm[0][name] for of_arm in there) for name in NUMBERS[:2])
            found.append(Pair(size, means, paired_difference(*nlls), active, flops))
    if not found:
        raise UserError(f"{given}: no size and seed has both")
    return found


def exponents(before: Pair, after: Pair):
    """Of each arm, the a of nll ~ parameters ** -a through two sizes; None of equal parameters or
    equal training FLOPs.
    """
    for i in range(2):
        ratio = math.log(after.active[i] / before.active[i])
        same = not ratio or max(before.flops[i], after.flops[i]) < EQUAL_FLOPS * min(
            before.flops[i], after.flops[i]
        )
        yield None if same else -math.log(after.nlls[i].value / before.nlls[i].value) / ratio


def table(found, arms):
    """A `Table` of pairs."""
    rows, before = [], None
    for pair in found:
        falls = exponents(before, pair) if before else (None, None)
        falls = ["-" if a is None else f"{a:.3f}" for a in falls]
        nlls = [plus_minus(nll) for nll in pair.nlls]
        rows.append([pair.size, *nlls, signed(pair.difference), str(pair.difference.n), *falls])
        before = pair
    first, second = arms
    head = ["size", first, second, f"{first} less {second} [95% interval]", "seeds"]
    return Table([*head, *(f"exponent from the size before, {arm}" for arm in arms)], rows)


def main():
    """Prints the table."""
    folder, arms = Path(cli.required(_RESULTS)).expanduser(), cli.required(_ARMS)
    print(to_markdown([table(pairs(finished_runs(folder), arms), arms)], "").strip())


if __name__ == "__main__":
    cli.run(main)
