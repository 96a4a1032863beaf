"""Collects the results of a suite from the directories of its runs, as DataFrames."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from aoe_jax.compare.choices import read_choices
from aoe_jax.compare.jobs import beside, last_line, read_outcome
from aoe_jax.compare.measure import configs_by_point, read_point, sweep_point
from aoe_jax.compare.results import (
    CURVE_COLUMNS,
    KEYS,
    LAYER_MEANS,
    MORE_RUN_COLUMNS,
    RUN_COLUMNS,
    Results,
)
from aoe_jax.compare.suite import Suite
from aoe_jax.compare.train_runs import folder_of, has_diverged, is_finished, read_summary
from aoe_jax.model.counts import parameter_counts, training_flops_per_token
from aoe_jax.storage.files import read_metrics


def read_results(suite: Suite, workdir: Path):
    """Reads the `Results` of the runs of a suite, finished or not, from their directories."""
    configs, rows, curves = configs_by_point(suite, workdir), [], []
    timed = {size: read_point(workdir, size, configs[size]) for size in suite.sizes}
    for run in suite.runs():
        folder, in_turn = folder_of(workdir, run), timed[run.size].get(run.arm)
        lines = pd.DataFrame(read_metrics(folder / "metrics.jsonl"))
        columns = ["step", "loss", "nll", "tokens_per_second", "dropped_share", "validation_nll"]
        lines = lines.reindex(columns=columns).astype(float)
        rows.append(_row(run, folder, lines, in_turn and in_turn["seconds"]))
        for split, loss, nll in (("train", "loss", "nll"), ("validation", *2 * ["validation_nll"])):
            of_split = lines[lines[loss].notna()]
            if len(of_split):
                curves.append(_curve(rows[-1], split, of_split["step"], of_split[nll]))
    runs = pd.DataFrame(rows, columns=[*RUN_COLUMNS, *MORE_RUN_COLUMNS])
    curves = pd.concat(curves) if curves else pd.DataFrame(columns=CURVE_COLUMNS)
    return Results(suite, runs, curves)


def _row(run, folder, lines, seconds_in_turn):
    """Returns the row of a run in `Results.runs`; `lines` are those of its metrics.jsonl."""
    finished, ended, config = is_finished(folder, run), read_outcome(folder), run.config
    summary = read_summary(folder / "summary.json") if finished else {}
    metrics, memory = (pd.Series(summary.get(name), dtype=float) for name in ("metrics", "memory"))
    nll = metrics.get("validation_nll", math.nan)
    line = ended["last_line"] if ended else last_line(beside(folder, ".log"))
    if has_diverged(folder):
        state = "diverged"
    elif finished:
        state = "finished" if math.isfinite(nll) else "diverged"
        line = line if state == "finished" else "diverged: its validation nll is not finite"
    else:
        state = "failed" if ended else "unfinished"
    speed = lines["tokens_per_second"][lines["loss"].notna()].median()
    seconds, shares = seconds_in_turn or config.tokens_per_step / speed, lines["dropped_share"]
    counts, steps = parameter_counts(config), config.train.steps
    tokens, flops_per_token = steps * config.tokens_per_step, training_flops_per_token(config)
    file = folder / "routing.json"
    choices = read_choices(file, config) if finished and file.exists() else None
    return {
        "size": run.size,
        "arm": run.arm,
        "seed": run.seed,
        "state": state,
        "last_line": line,
        "config": config,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "active_non_embedding": counts.active_non_embedding,
        "flops_per_token": flops_per_token,
        "learning_rate": config.train.learning_rate,
        "steps": steps,
        "tokens": tokens,
        "flops": tokens * flops_per_token,
        "seconds": steps * seconds,
        "seconds_per_step": seconds,
        "timed_in_turn": seconds_in_turn is not None,
        "tokens_per_second": config.tokens_per_step / seconds,
        "validation_nll": nll,
        "validation_bits_per_byte": metrics.get("validation_bits_per_byte", math.nan),
        "dropped_share": shares.dropna().tail(math.ceil(shares.count() / 10)).mean(),
        "memory_bytes": memory.reindex(["state_bytes", "temporary_bytes"]).sum(skipna=False),
        "choices": choices,
        **_at_the_end(choices),
    }


def _curve(row, split, step, nll):
    """Returns rows of `Results.curves` for a split of the run with this row of `Results.runs`."""
    step = np.asarray(step, int)
    costs = {name: step * row[name] / row["steps"] for name in ("tokens", "flops")}
    costs["seconds"] = step * row["seconds_per_step"]
    keys = {name: row[name] for name in KEYS} | {"split": split, "step": step}
    return pd.DataFrame(keys | costs | {"nll": np.asarray(nll, float)}, columns=CURVE_COLUMNS)


def _at_the_end(choices):
    """Returns columns of `Results.runs` from a run's routing.json: means over layers at the end.

    `dead_experts` is a sum over layers. `settled_first` and `settled_half` are the overlaps with
    the final choices at the first checkpoint and at half of the training.
    """
    if choices is None:
        return {}
    checkpoints, last = choices["checkpoints"], choices["checkpoints"][-1]
    found = {name: np.mean(last[name]) for name in LAYER_MEANS}
    # Shares of tokens add up to a whole number but for rounding.
    found["experts_per_token"] = round(float(np.sum(last["load"], axis=1).mean()), 6)
    found["dead_experts"] = np.sum(last["dead_experts"])
    found["settled_first"] = np.mean(checkpoints[0]["overlap_with_final"])
    half = next(c for c in checkpoints if c["step"] >= 0.5 * last["step"])
    if half["step"] <= 0.6 * last["step"]:
        found["settled_half"] = np.mean(half["overlap_with_final"])
    return found


def read_costs(suite: Suite, workdir: Path):
    """Returns a frame of each measured sweep by name, with a row for each arm and value."""
    frames = {}
    for name, sweep in suite.throughput.items():
        rows = []
        for value, configs in suite.swept(name).items():
            costs = read_point(workdir, sweep_point(name, value), configs)
            of_baseline = costs.get(suite.baseline, {"seconds": math.nan})
            for arm, cost in costs.items():
                tokens, seconds = configs[arm].tokens_per_step, cost["seconds"]
                row = {
                    "sweep": name,
                    "setting": sweep.setting,
                    "x": value,
                    "arm": arm,
                    "tokens_per_step": tokens,
                    "seconds_per_step": seconds,
                    "tokens_per_second": tokens / seconds,
                    "speed_to_baseline": of_baseline["seconds"] / seconds,
                    "flops_per_step": tokens * training_flops_per_token(configs[arm]),
                    "memory_bytes": cost["memory_bytes"],
                    "config": configs[arm],
                }
                rows.append(row)
        if any(row["arm"] == suite.baseline for row in rows):
            frames[name] = pd.DataFrame(rows)
    return frames
