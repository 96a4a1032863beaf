"""The results of a suite's runs as DataFrames, and comparisons of its arms.

`Results.runs` has a row for each run, `curves` a row for each reported step, `routing` a row for
each checkpoint and layer. The CSV files of a report are these frames.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aoe_jax.compare.measure import measured_points, step_seconds
from aoe_jax.compare.runs import beside, folder_of, is_finished, last_line
from aoe_jax.compare.statistics import (
    EQUAL_FLOPS,
    at,
    fit_parabola,
    fit_power_law,
    mean,
    paired_difference,
)
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.config.run import Config
from aoe_jax.counts import experts_per_token, parameter_counts, training_flops_per_token
from aoe_jax.json_files import read_json

KEYS = ["size", "arm", "seed"]
RUN_COLUMNS = [
    *KEYS,
    "state",  # finished | diverged (its validation nll is not finite) | failed | unfinished
    "parameters",
    "active_parameters",
    "active_non_embedding",
    "flops_per_token",  # useful FLOPs of training
    "learning_rate",
    "steps",
    "tokens",
    "flops",
    "validation_nll",  # of the whole validation split after the last step, nats a token
    "validation_bits_per_byte",
    "load_entropy",  # at the end, mean over layers
    "dropped_share",  # of the choices of training batches, for experts with a capacity
    "seconds_per_step",  # without compilation and validation
    "tokens_per_second",
    "memory_bytes",  # that the compiler plans for a device: state and temporaries
]
# Figures of routing at the end of a run -> digits in the report.
ROUTING_DIGITS = {
    "experts_per_token": 2,
    "confidence_entropy": 3,
    "max_violation": 2,
    "dead_experts": 1,
    "settled_first": 2,
    "settled_half": 2,
    "agreement": 3,  # with the oracle
    "distance_chosen": 2,
    "distance_oracle": 2,
    "distance_any": 2,
}
# `last_line` is that of the log; without `timed_in_turn`, seconds are the run's own median.
MORE_RUN_COLUMNS = ["last_line", "timed_in_turn", *ROUTING_DIGITS]
CURVE_COLUMNS = [*KEYS, "split", "step", "tokens", "flops", "seconds", "nll"]
LAYER_MEANS = ["load_entropy", "confidence_entropy", "max_violation"]
LAYER_FIGURES = [*LAYER_MEANS, "dead_experts", "overlap_with_final"]
ROUTING_COLUMNS = [*KEYS, "step", "layer", "experts_per_token", *LAYER_FIGURES]
COST_COLUMNS = [
    "sweep",
    "setting",
    "x",
    "arm",
    "tokens_per_step",
    "seconds_per_step",
    "tokens_per_second",
    "speed_to_baseline",
    "flops_per_step",
    "memory_bytes",  # of a device: state and temporaries; None for absent machines
    "received_bytes",  # by a chip; None for this machine
]
BALANCED_BY = {  # methods that balance load, or couple router and experts, by themselves
    "expert_choice": "expert choice",
    "threshold": "thresholds",
    "routing_free": "its own losses",
    "gshard": "its loss of first choices",
    "erc": "L_ERC",
}
BUDGETS = ("end", "flops", "seconds")  # at which arms are compared
SCALES = {
    "active_non_embedding": "active parameters without embeddings",
    "flops": "useful training FLOPs",
}


@dataclass(frozen=True)
class Results:
    """The results of a suite's runs."""

    suite: Suite
    configs: Mapping[tuple[str, str], Config]  # (size, arm) -> that of the first seed
    runs: pd.DataFrame  # RUN_COLUMNS and MORE_RUN_COLUMNS
    curves: pd.DataFrame  # CURVE_COLUMNS
    reports: Mapping[tuple[str, str, int], Mapping]  # (size, arm, seed) -> routing.json

    @functools.cached_property
    def labels(self):
        """Arm -> label."""
        return {name: arm.label for name, arm in self.suite.arms.items()}

    @property
    def baseline_label(self):
        """The label of the baseline."""
        return self.labels[self.suite.baseline]

    @functools.cached_property
    def routing(self):
        """ROUTING_COLUMNS of all analysed runs."""
        rows = []
        for keys, report in self.reports.items():
            for checkpoint in report["checkpoints"]:
                for layer, load in enumerate(checkpoint["load"]):
                    figures = [checkpoint[name][layer] for name in LAYER_FIGURES]
                    rows.append([*keys, checkpoint["step"], layer, sum(load), *figures])
        return pd.DataFrame(rows, columns=ROUTING_COLUMNS)

    def finished(self, size, arm):
        """Returns the rows of the finished runs of an arm, by seed."""
        runs = self.runs
        rows = (runs["size"] == size) & (runs["arm"] == arm) & (runs["state"] == "finished")
        return runs[rows].set_index("seed")

    def arms(self, size):
        """Returns the arms of a size that have a finished run."""
        return [arm for arm in self.suite.arms_of(size) if len(self.finished(size, arm))]

    @functools.cached_property
    def sizes(self):
        """The sizes that have a finished run."""
        return [size for size in self.suite.sizes if self.arms(size)]

    @property
    def pairs(self):
        """`[(size, arm)]` with a finished run."""
        return [(size, arm) for size in self.sizes for arm in self.arms(size)]

    def routed(self, size):
        """Returns `{arm: [routing.json of each seed]}` of the analysed runs of a size."""
        found = {}
        for arm in self.arms(size):
            keys = [(size, arm, seed) for seed in self.finished(size, arm).index]
            found[arm] = [self.reports[key] for key in keys if key in self.reports]
        return {arm: reports for arm, reports in found.items() if reports}

    def first_reports(self, size):
        """Returns `[(label, routing.json of the first seed)]` of the analysed arms of a size."""
        return [(self.labels[arm], reports[0]) for arm, reports in self.routed(size).items()]

    def finished_curves(self, size):
        """Returns the rows of `curves` of the finished runs of a size."""
        runs = self.runs
        finished = runs[(runs["state"] == "finished") & (runs["size"] == size)]
        return self.curves.merge(finished[KEYS])

    def depends_on_data(self, size, arm):
        """Whether the number of experts a token, and so the cost, is only known from training."""
        return experts_per_token(self.configs[size, arm]) is None

    def is_comparable(self, size, arm):
        """Whether losses of an arm compare with others: not if experts choose among tokens."""
        config = self.configs[size, arm]
        return config.routing.name != "expert_choice"

    def mean(self, size, arm, column):
        """Returns the `Estimate` over seeds of a column of `runs`."""
        return mean(self.finished(size, arm)[column])

    def ratio(self, size, arm, column):
        """Writes the ratio of an arm's mean of a column to the baseline's; a dash without one."""
        other = self.mean(size, self.suite.baseline, column)
        return f"{self.mean(size, arm, column).value / other.value:.2f}" if other.n else "-"

    def budget(self, size, arms, kind):
        """Returns the least that arms of a size have spent, of "flops" or "seconds".

        NaN if an arm has not run, or if its cost depends on the data.
        """
        if any(self.depends_on_data(size, arm) for arm in arms):
            return math.nan
        spent = []
        for arm in arms:
            rows = self.finished(size, arm)
            seconds = rows["steps"] * rows["seconds_per_step"]
            spent.append((rows["flops"] if kind == "flops" else seconds).min())
        return float(np.min(spent))  # NaN if there are no rows

    def nlls(self, size, arm, kind="end", budget=None):
        """Returns the validation nll of an arm by seed, without NaN.

        Args:
          size: its name.
          arm: its name.
          kind: "end" for the nll after the last step; else where the curve reaches a budget of
            "flops" or "seconds".
          budget: the budget.
        """
        rows, curves = self.finished(size, arm), self.curves
        if kind == "end":
            return rows["validation_nll"]
        of_arm = (curves["size"] == size) & (curves["arm"] == arm)
        validation = curves[of_arm & (curves["split"] == "validation")]
        found = {}
        for seed in rows.index:
            curve = validation[validation["seed"] == seed]
            found[seed] = at(curve[kind], curve["nll"], budget)
        return pd.Series(found, dtype=float).dropna()

    def difference(self, size, arm, kind="end", to=None):
        """Returns the `Estimate` of an arm's nll minus another's, seed by seed.

        It has no seeds where one of the two is not comparable.

        Args:
          size: its name.
          arm: its name.
          kind: one of BUDGETS. A budget is what the cheaper of the two has spent at its end.
          to: the other arm; None means the arm's reference.
        """
        arms = arm, to or self.suite.reference(arm)
        if not all(self.is_comparable(size, one) for one in arms):
            return mean([])
        budget = None if kind == "end" else self.budget(size, arms, kind)
        return paired_difference(*(self.nlls(size, one, kind, budget) for one in arms))

    def differences(self):
        """Returns the frame of `differences.csv`."""
        rows = []
        for size, arm in self.pairs:
            for kind in BUDGETS if arm != self.suite.baseline else ():
                row = {"size": size, "arm": arm, "to": self.suite.reference(arm), "at_equal": kind}
                rows.append(row | dataclasses.asdict(self.difference(size, arm, kind)))
        return pd.DataFrame(rows)

    @functools.cached_property
    def isoflop_sizes(self):
        """Lists of three or more sizes that cost the baseline equal training FLOPs."""
        of_baseline = self.runs[self.runs["arm"] == self.suite.baseline]
        flops = of_baseline.groupby("size")["flops"].first().sort_values()
        lists = []
        for size, value in flops.items():
            if lists and value <= EQUAL_FLOPS * flops[lists[-1][0]]:
                lists[-1].append(size)
            else:
                lists.append([size])
        in_order = [[size for size in self.suite.sizes if size in sizes] for sizes in lists]
        return [sizes for sizes in in_order if len(sizes) > 2]

    def flops(self, sizes, arm):
        """Returns the training FLOPs of the finished runs of an arm."""
        return pd.concat([self.finished(size, arm)["flops"] for size in sizes])

    def isoflops(self, sizes):
        """Fits parabolas over sizes of `isoflop_sizes`.

        Returns:
          `{arm: ({active parameters: [nll of each seed]}, Parabola)}` of the arms to which the
          sizes cost equal FLOPs.
        """
        found = {}
        for arm in self.suite.arms:
            rows = pd.concat([self.finished(size, arm) for size in sizes])
            groups, flops = _groups(rows, "active_non_embedding"), rows["flops"]
            fit = fit_parabola(groups)
            if fit and flops.max() <= EQUAL_FLOPS * flops.min():
                found[arm] = groups, fit
        return found

    def scaling(self, scale):
        """Fits power laws over sizes, without sizes of equal FLOPs, which have another purpose.

        Args:
          scale: a key of SCALES.

        Returns:
          `{arm: ({x: [nll of each seed]}, PowerLaw)}` of arms with two sizes or more that all
          differ in x.
        """
        isoflop = set().union(*self.isoflop_sizes)
        sizes = [size for size in self.suite.sizes if size not in isoflop]
        found = {}
        for arm in self.suite.arms if sizes else ():
            rows = pd.concat([self.finished(size, arm) for size in sizes])
            groups = _groups(rows, scale)
            if len(groups) == rows["size"].nunique() > 1:
                found[arm] = groups, fit_power_law(groups)
        return found

    def balance_of(self, size, arm):
        """Returns `(kind of layer, balancing methods)` in words; None for arms without a choice."""
        config = self.configs[size, arm]
        b, e, routing = config.balance, config.experts, config.routing
        if not routing.chooses:
            return None
        default_k = self.configs[size, self.suite.baseline].experts.top_k
        kinds = {"aoe": f"AoE, r={e.d_low}", "router": "MoE"}
        if e.kind == "capacity":
            kinds["capacity"] = f"MoE, capacity {routing.capacity_factor:g}"
        layer = {
            kinds.get(e.kind, e.kind): True,
            "factorised gate": e.factorised_gate,
            "large router": e.large_router,
            f"K={e.top_k}": e.top_k != default_k,
            f"{routing.name.replace('_', ' ')} router": routing.name not in ("top_k", e.kind),
            "weights over all": routing.name == "top_k" and not routing.norm_topk_prob,
        }
        methods = {
            BALANCED_BY.get(routing.name, ""): routing.name in BALANCED_BY,
            "L_aux of each sequence" if b.aux_batch == "sequence" else "L_aux": b.aux_weight,
            "Ent_conf": b.entropy_weight,
            "z-loss": b.z_weight,
            "loss-free bias": b.bias_rate,
        }
        layer = ", ".join(name for name, holds in layer.items() if holds)
        methods = " + ".join(name for name, holds in methods.items() if holds)
        return layer, methods or "nothing"


def _groups(rows, scale):
    return rows.groupby(scale, sort=False)["validation_nll"].apply(list).to_dict()


def read_results(suite: Suite, runs: Sequence[Run], workdir: Path):
    """Reads the `Results` of runs, finished or not, from their directories."""
    configs, rows, curves, reports = {}, [], [], {}
    timed = {size: step_seconds(workdir, runs, size) or {} for size in suite.sizes}
    for run in runs:
        configs.setdefault((run.size, run.arm), run.config)
        seconds = timed[run.size].get(run.arm)
        row, of_run, report = _read_run(run, folder_of(workdir, run), seconds)
        rows.append(row)
        curves += of_run
        if report:
            reports[run.size, run.arm, run.seed] = report
    return make_results(suite, configs, rows, curves, reports)


def make_results(suite, configs, rows, curves, reports):
    """Returns `Results` from rows of `runs` as dicts and a list of frames of `curves`."""
    runs = pd.DataFrame(rows, columns=[*RUN_COLUMNS, *MORE_RUN_COLUMNS])
    curves = [curve for curve in curves if len(curve)]
    curves = pd.concat(curves) if curves else pd.DataFrame(columns=CURVE_COLUMNS)
    return Results(suite, configs, runs, curves, reports)


def _read_run(run, folder, seconds):
    """Returns a row of `Results.runs`, a list of frames of `curves`, and routing.json or None."""
    finished, outcome = is_finished(folder, run), beside(folder, ".outcome.json")
    ended = read_json(outcome) if outcome.exists() else None
    summary = read_json(folder / "summary.json") if finished else {"metrics": {}, "memory": {}}
    metrics, memory = (pd.Series(summary[name], dtype=float) for name in ("metrics", "memory"))
    nll = metrics.get("validation_nll", math.nan)
    state = "failed" if ended else "unfinished"
    if finished:
        state = "finished" if math.isfinite(nll) else "diverged"
    log = beside(folder, ".log")
    lines = _read_lines(folder / "metrics.jsonl")
    train, validation = (lines[lines[name].notna()] for name in ("loss", "validation_nll"))
    own_seconds = run.config.tokens_per_step / train["tokens_per_second"].median()
    shares = lines["dropped_share"].dropna()
    file = folder / "routing.json"
    report = read_json(file) if finished and file.exists() else None
    row = describe(run) | {
        "state": state,
        "last_line": ended["last_line"] if ended else last_line(log) if log.exists() else "",
        "validation_nll": nll,
        "validation_bits_per_byte": metrics.get("validation_bits_per_byte", math.nan),
        "dropped_share": shares.tail(math.ceil(len(shares) / 10)).mean(),
        "seconds_per_step": seconds or own_seconds,
        "timed_in_turn": seconds is not None,
        "memory_bytes": memory.reindex(["state_bytes", "temporary_bytes"]).sum(skipna=False),
    }
    row["tokens_per_second"] = run.config.tokens_per_step / row["seconds_per_step"]
    curves = [
        curve_of(row, "train", train["step"], train["nll"]),
        curve_of(row, "validation", validation["step"], validation["validation_nll"]),
    ]
    return row | _routing_figures(report), curves, report


def describe(run: Run):
    """Returns the columns of `Results.runs` that are known before training."""
    config, counts = run.config, parameter_counts(run.config)
    return {
        "size": run.size,
        "arm": run.arm,
        "seed": run.seed,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "active_non_embedding": counts.active_non_embedding,
        "flops_per_token": training_flops_per_token(config),
        "learning_rate": config.train.learning_rate,
        "steps": config.train.steps,
        "tokens": config.train.steps * config.tokens_per_step,
        "flops": run.flops,
    }


def _read_lines(path):
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a killed run may be cut off
            continue
    columns = ["step", "loss", "nll", "tokens_per_second", "dropped_share", "validation_nll"]
    return pd.DataFrame(found).reindex(columns=columns).astype(float)


def curve_of(row, split, step, nll):
    """Returns the rows of `Results.curves` of a split of a run, whose row of `runs` is given."""
    step = np.asarray(step, int)
    keys = {name: row[name] for name in KEYS} | {"split": split}
    costs = {
        "step": step,
        "tokens": step * row["tokens"] / row["steps"],
        "flops": step * row["flops"] / row["steps"],
        "seconds": step * row["seconds_per_step"],
        "nll": np.asarray(nll, float),
    }
    return pd.DataFrame(keys | costs, columns=CURVE_COLUMNS)


def _routing_figures(report):
    """Summarises a run's routing.json by columns of `runs`: means over layers at the end.

    `dead_experts` is a sum over layers. `settled_first` and `settled_half` are the overlaps with
    the final choices at the first checkpoint and at half of the training. Missing figures are left
    out.
    """
    if report is None:
        return {}
    checkpoints, last = report["checkpoints"], report["checkpoints"][-1]
    found = {name: np.mean(last[name]) for name in LAYER_MEANS}
    # Shares of tokens add up to a whole number but for rounding.
    found["experts_per_token"] = round(float(np.sum(last["load"], axis=1).mean()), 6)
    found["dead_experts"] = np.sum(last["dead_experts"])
    found["settled_first"] = np.mean(checkpoints[0]["overlap_with_final"])
    half = next(c for c in checkpoints if c["step"] >= 0.5 * last["step"])
    if half["step"] <= 0.6 * last["step"]:
        found["settled_half"] = np.mean(half["overlap_with_final"])
    return found | {name: np.mean(values) for name, values in (report["oracle"] or {}).items()}


def read_costs(suite: Suite, workdir: Path):
    """Returns a frame of all sweeps, with a row for each measured arm and value.

    The columns are COST_COLUMNS and `config`. Arms are in the order of the suite.
    """
    rows = []
    for name, sweep in suite.throughput.items():
        points = list(measured_points(suite, workdir, name))
        for arm in suite.arms:
            rows += [
                _cost(name, sweep, arm, configs[arm], figures[arm])
                for _, configs, figures in points
                if figures and arm in figures
            ]
    frame = pd.DataFrame(rows, columns=[*COST_COLUMNS, "config"])
    base = frame[frame["arm"] == suite.baseline].set_index(["sweep", "x"])["tokens_per_second"]
    keys = pd.MultiIndex.from_frame(frame[["sweep", "x"]])
    frame["speed_to_baseline"] = frame["tokens_per_second"] / base.reindex(keys).to_numpy()
    return frame


def _cost(name, sweep, arm, config, figures):
    tokens = config.tokens_per_step
    return {
        "sweep": name,
        "setting": sweep.setting,
        "x": sweep.position(config),
        "arm": arm,
        "tokens_per_step": tokens,
        "seconds_per_step": figures["seconds"],
        "tokens_per_second": tokens / figures["seconds"],
        "flops_per_step": tokens * training_flops_per_token(config),
        "memory_bytes": figures.get("memory_bytes"),
        "received_bytes": figures.get("received_bytes"),
        "config": config,
    }
