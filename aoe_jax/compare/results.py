"""The results of a suite's runs as DataFrames, and comparisons of its arms."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aoe_jax.compare.statistics import at, fit_power_law, mean
from aoe_jax.compare.suite import Suite
from aoe_jax.model.counts import experts_per_token

KEYS = ["size", "arm", "seed"]
RUN_COLUMNS = [  # of runs.csv
    *KEYS,
    "state",  # finished | diverged | failed | unfinished
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
# Measurements of routing at the end of a run -> digits in the report.
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
    "seconds",  # of all training steps
    "timed_in_turn",  # False: seconds are the run's own median
    "last_line",  # of the log
    "config",
    "choices",  # the content of routing.json, or NaN
]
CURVE_COLUMNS = [*KEYS, "split", "step", "tokens", "flops", "seconds", "nll"]
LAYER_MEANS = ["load_entropy", "confidence_entropy", "max_violation"]
LAYER_COLUMNS = [*LAYER_MEANS, "dead_experts", "overlap_with_final"]
ROUTING_COLUMNS = [*KEYS, "step", "layer", "experts_per_token", *LAYER_COLUMNS]
SCALES = {
    "active_non_embedding": "active parameters without embeddings",
    "flops": "useful training FLOPs",
}


@dataclass(frozen=True)
class Results:
    """The results of a suite's runs; the CSV files of a report are these frames."""

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
        """Returns the rows of the finished runs of an arm, by seed."""
        runs = self.finished_runs
        return runs[(runs["size"] == size) & (runs["arm"] == arm)].set_index("seed")

    def arms(self, size):
        """Returns the arms of a size that have a finished run."""
        return [arm for arm in self.suite.arms_of(size) if len(self.finished(size, arm))]

    @functools.cached_property
    def sizes(self):
        return [size for size in self.suite.sizes if self.arms(size)]

    @property
    def pairs(self):
        return [(size, arm) for size in self.sizes for arm in self.arms(size)]

    def routed(self, size):
        """Returns `{arm: [choices of each seed]}` of the analysed runs of a size."""
        found = {arm: [*self.finished(size, arm)["choices"].dropna()] for arm in self.arms(size)}
        return {arm: of_seeds for arm, of_seeds in found.items() if of_seeds}

    def of_finished(self, frame, size):
        """Returns the rows of `curves` or `routing` of the finished runs of a size."""
        return frame[frame["size"] == size].merge(self.finished_runs[KEYS])

    def is_comparable(self, size, arm):
        """Whether an arm's losses compare with others: not if experts choose among later tokens."""
        return self.configs[size, arm].routing.name != "expert_choice"

    def mean(self, size, arm, column):
        return mean(self.finished(size, arm)[column])

    def ratio(self, size, arm, column):
        """Formats the ratio of an arm's mean of a column to the baseline's, or "-"."""
        other = self.mean(size, self.suite.baseline, column)
        return f"{self.mean(size, arm, column).value / other.value:.2f}" if other.n else "-"

    def budget(self, size, arms, kind):
        """Returns the least "flops" or "seconds" that arms of a size have spent.

        NaN if an arm has not finished, or if its cost depends on the data.
        """
        if any(experts_per_token(self.configs[size, arm]) is None for arm in arms):
            return math.nan
        return float(np.min([self.finished(size, arm)[kind].min() for arm in arms]))

    def nlls(self, size, arm, kind="end", budget=None):
        """Returns the validation nll of an arm by seed, at the end or at a budget.

        `kind` is "end", "flops" or "seconds". Seeds whose curve does not reach the budget are left
        out.
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
        """Returns the `Estimate` of an arm's nll minus that of its reference, seed by seed.

        For the `kind` "flops" or "seconds", the budget is what the cheaper of the two has spent.
        Without seeds: one of the two is not comparable.
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
        return pd.DataFrame(rows)

    def scaling(self, scale):
        """Fits a power law over sizes for each arm: `{arm: ({x: [nll of each seed]}, PowerLaw)}`.

        x is a key of SCALES. Arms need two or more sizes, all at different x. The result is empty
        if sizes differ in corpus or experts, or if they cost the baseline equal FLOPs.
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
