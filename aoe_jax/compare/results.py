"""Reads the results of a suite's runs into DataFrames, and compares its arms."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aoe_jax.compare.choices import LAYER_COLUMNS, LAYER_MEANS, read_choices
from aoe_jax.compare.jobs import beside, last_line, read_outcome
from aoe_jax.compare.measure import configs_by_point, read_point
from aoe_jax.compare.statistics import at, fit_power_law, holm, mean
from aoe_jax.compare.suite import Suite
from aoe_jax.compare.train_runs import folder_of, has_diverged, is_finished, read_summary
from aoe_jax.model.counts import experts_per_token, parameter_counts, training_flops_per_token
from aoe_jax.storage.files import read_metrics

KEYS = ["size", "arm", "seed"]
RUN_COLUMNS = [  # columns of runs.csv
    *KEYS,
    "state",  # finished | diverged | failed | unfinished
    "parameters",
    "active_parameters",
    "active_non_embedding",
    "flops_per_token",  # useful FLOPs of training, with the experts that tokens take at the end
    "learning_rate",
    "steps",
    "tokens",
    "flops",
    "validation_nll",  # nats per token, on the whole validation split at the end
    "validation_bits_per_byte",
    "load_entropy",  # after the last step, mean over layers
    "dropped_share",  # dropped (token, expert) pairs / all pairs, for experts with a capacity
    "seconds_per_step",  # without compilation and validation
    "tokens_per_second",
    "memory_bytes",  # per device: the train state, and the temporaries that the compiler reports
]
# Routing statistic after the last step -> number of its decimals in the report.
ROUTING_DIGITS = {
    "experts_per_token": 2,
    "confidence_entropy": 3,
    "max_violation": 2,
    "dead_experts": 1,
    "settled_first": 2,
    "settled_half": 2,
}
MORE_RUN_COLUMNS = [
    *ROUTING_DIGITS,
    "seconds",  # of all training steps together
    "timed_in_turn",  # True: step times are from `measure_point`; False: from metrics.jsonl
    "last_line",  # last line of the log
    "config",
    "choices",  # the content of routing.json, or NaN
]
CURVE_COLUMNS = [*KEYS, "split", "step", "tokens", "flops", "seconds", "nll"]
ROUTING_COLUMNS = [*KEYS, "step", "layer", "experts_per_token", *LAYER_COLUMNS]
SCALES = {
    "active_non_embedding": "active parameters without embeddings",
    "flops": "useful training FLOPs",
}


@dataclass(frozen=True)
class Results:
    """The results of a suite's runs; the CSV files of a report contain these frames."""

    suite: Suite
    runs: pd.DataFrame  # a row for each run: RUN_COLUMNS and MORE_RUN_COLUMNS
    curves: pd.DataFrame  # a row for each reported step: CURVE_COLUMNS

    @functools.cached_property
    def labels(self):
        return {name: arm.label for name, arm in self.suite.arms.items()}

    @functools.cached_property
    def first_runs(self):
        return self.runs.drop_duplicates(["size", "arm"])

    @functools.cached_property
    def configs(self):
        """(size, arm) -> `Config` of the first seed."""
        return self.first_runs.set_index(["size", "arm"])["config"].to_dict()

    @functools.cached_property
    def finished_runs(self):
        return self.runs[self.runs["state"] == "finished"]

    @functools.cached_property
    def routing(self):
        """A row for each run, checkpoint and layer: ROUTING_COLUMNS."""
        rows = []
        for *keys, choices in self.runs.dropna(subset="choices")[[*KEYS, "choices"]].to_numpy():
            for checkpoint in choices["checkpoints"]:
                for layer, load in enumerate(checkpoint["load"]):
                    of_layer = [checkpoint[name][layer] for name in LAYER_COLUMNS]
                    rows.append([*keys, checkpoint["step"], layer, sum(load), *of_layer])
        return pd.DataFrame(rows, columns=ROUTING_COLUMNS)

    def finished(self, size, arm):
        """Returns the finished runs of an arm at a size, with the seed as index."""
        runs = self.finished_runs
        return runs[(runs["size"] == size) & (runs["arm"] == arm)].set_index("seed")

    def arms(self, size):
        """Returns the arms that have a finished run at a size."""
        arms = self.suite.arms_of(self.suite.sizes[size])
        return [arm for arm in arms if len(self.finished(size, arm))]

    @functools.cached_property
    def sizes(self):
        return [size for size in self.suite.sizes if self.arms(size)]

    @property
    def pairs(self):
        return [(size, arm) for size in self.sizes for arm in self.arms(size)]

    def routed(self, size):
        """Returns `{arm: [routing.json of each seed as a dict]}` of analysed runs of a size."""
        found = {arm: [*self.finished(size, arm)["choices"].dropna()] for arm in self.arms(size)}
        return {arm: of_seeds for arm, of_seeds in found.items() if of_seeds}

    def of_finished(self, frame, size):
        """Returns the rows of `curves` or `routing` that belong to finished runs of a size."""
        return frame[frame["size"] == size].merge(self.finished_runs[KEYS])

    def is_comparable(self, size, arm):
        """Whether losses are comparable; False for expert choice, because it is not causal."""
        return self.configs[size, arm].routing.name != "expert_choice"

    def mean(self, size, arm, column):
        return mean(self.finished(size, arm)[column])

    def ratio(self, size, arm, column):
        """Formats (an arm's mean of a column) / (the baseline's mean), or "-" without baseline."""
        other = self.mean(size, self.suite.baseline, column)
        return f"{self.mean(size, arm, column).value / other.value:.2f}" if other.n else "-"

    def budget(self, size, arms, kind):
        """Returns the smallest total "flops" or "seconds" of the finished runs of these arms.

        The result is NaN if an arm has no finished run, or if its FLOPs depend on the data.
        """
        if any(experts_per_token(self.configs[size, arm]) is None for arm in arms):
            return math.nan
        return float(np.min([self.finished(size, arm)[kind].min() for arm in arms]))

    def nlls(self, size, arm, kind="end", budget=None):
        """Returns the validation nll of an arm by seed, after the last step or at a budget.

        `kind` is "end", "flops" or "seconds". Seeds without a loss at `budget` are left out.
        """
        rows = self.finished(size, arm)
        if kind == "end":
            return rows["validation_nll"]
        curves, found = self.of_finished(self.curves, size), {}
        of_arm = curves[(curves["arm"] == arm) & (curves["split"] == "validation")]
        for seed in rows.index:
            curve = of_arm[of_arm["seed"] == seed]
            found[seed] = at(curve[kind], curve["nll"], budget)
        return pd.Series(found, dtype=float).dropna()

    def difference(self, size, arm, kind="end"):
        """Returns the `Estimate` of an arm's nll minus the nll of its reference, paired by seed.

        For the `kind` "flops" or "seconds", both arms are compared at the cost of the cheaper one.
        If one of the two arms is not comparable, the estimate has n = 0.
        """
        arms = arm, self.suite.reference(arm)
        if not all(self.is_comparable(size, one) for one in arms):
            return mean([])
        budget = None if kind == "end" else self.budget(size, arms, kind)
        nlls, others = (self.nlls(size, one, kind, budget) for one in arms)
        return mean(nlls - others)

    def differences(self):
        rows = []
        for size, arm in self.pairs:
            for kind in ("end", "flops", "seconds") if arm != self.suite.baseline else ():
                row = {"size": size, "arm": arm, "to": self.suite.reference(arm), "at_equal": kind}
                rows.append(row | dataclasses.asdict(self.difference(size, arm, kind)))
        found = pd.DataFrame(rows)
        if len(found):  # corrected over the arms of a size
            found["p_holm"] = found.groupby(["size", "at_equal"])["p"].transform(holm)
        return found

    def scaling(self, scale):
        """Fits a power law over sizes for each arm: `{arm: ({x: [nll of each seed]},
        (factor, exponent))}`.

        x is the column `scale`, a key of SCALES. An arm needs two or more sizes, all with different
        x. The result is empty if sizes differ in data, n_experts or top_k, or have equal FLOPs.
        """
        of_baseline = self.runs[self.runs["arm"] == self.suite.baseline].drop_duplicates("size")
        settings = {(c.data, c.experts.n_experts, c.experts.top_k) for c in of_baseline["config"]}
        grows = of_baseline["flops"].max() > 1.1 * of_baseline["flops"].min()
        found = {}
        for arm in self.suite.arms if len(settings) == 1 and grows else ():
            rows = self.finished_runs[self.finished_runs["arm"] == arm]
            groups = rows.groupby(scale, sort=False)["validation_nll"].apply(list).to_dict()
            if len(groups) == rows["size"].nunique() > 1:
                found[arm] = groups, fit_power_law(groups)
        return found


def read_results(suite: Suite, workdir: Path):
    """Reads the `Results` of all runs of a suite, also unfinished ones, from their directories."""
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
    """Returns the row of a run in `Results.runs`; `lines` has the lines of its metrics.jsonl."""
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
    file = folder / "routing.json"
    choices = read_choices(file) if finished and file.exists() else None
    at_the_end = _at_the_end(choices)
    flops_per_token = training_flops_per_token(config, at_the_end.get("experts_per_token"))
    tokens = steps * config.tokens_per_step
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
        "learning_rate": config.rate_factor * config.train.learning_rate,
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
        **at_the_end,
    }


def _curve(row, split, step, nll):
    """Returns the rows of `Results.curves` for one split of a run; `row` is from `_row`."""
    step = np.asarray(step, int)
    costs = {name: step * row[name] / row["steps"] for name in ("tokens", "flops")}
    costs["seconds"] = step * row["seconds_per_step"]
    keys = {name: row[name] for name in KEYS} | {"split": split, "step": step}
    return pd.DataFrame(keys | costs | {"nll": np.asarray(nll, float)}, columns=CURVE_COLUMNS)


def _at_the_end(choices):
    """Returns the columns of `Results.runs` that are computed from a run's routing.json.

    They are means over layers at the last checkpoint; `dead_experts` is a sum. `settled_first` and
    `settled_half` are overlaps of final choices with those of the first and the middle checkpoint.
    """
    if choices is None:
        return {}
    checkpoints, last = choices["checkpoints"], choices["checkpoints"][-1]
    found = {name: np.mean(last[name]) for name in LAYER_MEANS}
    # If K is fixed, the loads of a layer add up to K plus rounding errors, which `round` removes.
    found["experts_per_token"] = round(float(np.sum(last["load"], axis=1).mean()), 6)
    found["dead_experts"] = np.sum(last["dead_experts"])
    found["settled_first"] = np.mean(checkpoints[0]["overlap_with_final"])
    half = next(c for c in checkpoints if c["step"] >= 0.5 * last["step"])
    if half["step"] <= 0.6 * last["step"]:
        found["settled_half"] = np.mean(half["overlap_with_final"])
    return found


def read_costs(suite: Suite, workdir: Path):
    """Returns `{sweep: frame}` of the measured sweeps, with a row for each arm and value."""
    frames = {}
    for name, sweep in suite.throughput.items():
        rows = []
        for value, configs in suite.swept(name).items():
            costs = read_point(workdir, f"{name}_{value}", configs)
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
                    "memory_bytes": cost["memory_bytes"],
                    "config": configs[arm],
                }
                rows.append(row)
        if any(row["arm"] == suite.baseline for row in rows):
            frames[name] = pd.DataFrame(rows)
    return frames
