"""Results of suites at any sizes without training."""

import itertools
import math

from aoe_jax.compare.collect import curve_of, make_results, row_of
from aoe_jax.compare.report import to_markdown
from aoe_jax.compare.suite import Size, Suite
from aoe_jax.config.run import Config
from aoe_jax.model.counts import training_flops_per_token
from configs import tiny
from configs.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "aux"), "dense": DENSE, "active": DENSE_ACTIVE}
CURVE = ([1, 2], [6.0, 5.0])


def size_at(flops, width, factor=1.0):
    """A size with that many FLOPs for the MoE, by its number of steps."""
    changes = {
        "model": {"d_model": width, "n_layers": 2, "vocab_size": 512},
        "experts": {"d_ffn": 2 * width},
    }
    config = tiny.get_config("moe")
    for group, values in changes.items():
        config[group].update(values)
    tokens = config.train.batch_size * config.data.seq_len
    per_step = training_flops_per_token(Config.from_config_dict(config)) * tokens
    return Size(changes | {"train": {"steps": round(factor * flops / per_step)}}, seeds=2)


def suite_of(sizes, **changes):
    return Suite("s", tiny.get_config(), **{"arms": ARMS, "baseline": "moe"} | changes, sizes=sizes)


def results(suite, nll, curve=CURVE, reports=None, seconds_per_step=lambda run: 1.0, **columns):
    """Results with all runs finished.

    `nll`, `seconds_per_step` and further columns of `Results.runs` are functions of a run;
    `reports` are routing.json by run; `curve` is `(steps, nlls)` of both splits.
    """
    rows, curves = [], []
    reports = reports or {}
    for run in suite.runs():
        of_run = {
            "state": "finished",
            "last_line": "",
            "validation_nll": nll(run),
            "validation_bits_per_byte": 1.0,
            "timed_in_turn": True,
            "memory_bytes": 1.0,
            "dropped_share": math.nan,
        }
        of_run |= {name: column(run) for name, column in columns.items()}
        report = reports.get((run.size, run.arm, run.seed))
        rows.append(row_of(run, seconds_per_step(run), report, **of_run))
        curves += [curve_of(rows[-1], split, *curve) for split in ("train", "validation")]
    return make_results(suite, rows, curves)


def comparison(sizes, loss):
    """Results whose nll is `loss(run)`."""
    return results(suite_of(sizes), loss)


def markdown(found, costs=None):
    """The report without its machine."""
    text, _ = to_markdown(found, costs or {}, command="command")
    return text


def table(text, heading):
    """The cells of the first table after a heading of a report."""
    lines = text[text.index(f"# {heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
