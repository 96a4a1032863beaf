"""What the results of a suite say: by size and arm, at the end and at equal budgets, and fitted
over sizes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from aoe_jax.compare.results import Result
from aoe_jax.compare.statistics import (
    Parabola,
    at,
    fit_parabola,
    fit_power_law,
    mean,
    paired_difference,
)
from aoe_jax.compare.suite import Suite
from aoe_jax.counts import experts_per_token, parameter_counts
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection import SELECTIONS

BUDGETS = ("end", "flops", "seconds")  # at what arms are held against the baseline
EQUAL_FLOPS = 1.1  # up to what ratio the training FLOPs of sizes count as equal
SCALES = {
    "active_non_embedding": "active parameters without embeddings",
    "flops": "useful training FLOPs",
}


@dataclass(frozen=True)
class IsoFlops:
    """An arm at sizes of equal training FLOPs."""

    flops: float  # their mean
    groups: dict  # {active parameters without embeddings: [nll of each seed]}
    fit: Parabola


@dataclass(frozen=True)
class Comparison:
    """A suite and the results of its runs."""

    suite: Suite
    results: Sequence[Result]

    @functools.cached_property
    def labels(self):
        """arm -> label."""
        return {name: arm.label for name, arm in self.suite.arms.items()}

    @property
    def baseline_label(self):
        """The label of the baseline."""
        return self.labels[self.suite.baseline]

    @property
    def not_matched(self):
        """Which arms aren't matched in total parameters: a sentence after another one, or nothing."""
        labels = [arm.label for arm in self.suite.arms.values() if not arm.matched]
        return f" Not matched in total parameters: {'; '.join(labels)}." if labels else ""

    def finished(self, size, arm):
        """The results of the finished runs of an arm, by seed."""
        return [
            r for r in self.results if (r.run.size, r.run.arm, r.state) == (size, arm, "finished")
        ]

    def series(self, size):
        """`{arm: [Result, ...]}` of a size, arms without a finished run left out."""
        found = {arm: self.finished(size, arm) for arm in self.suite.arms_of(size)}
        return {arm: results for arm, results in found.items() if results}

    def sizes(self):
        """The sizes that have a finished run."""
        return [size for size in self.suite.sizes if self.series(size)]

    def largest(self):
        """The last size in which every arm of it has a finished run; else the last with any; None
        of none.
        """
        sizes = self.sizes()
        whole = [size for size in sizes if len(self.series(size)) == len(self.suite.arms_of(size))]
        return (whole or sizes or [None])[-1]

    def takes_what_it_needs(self, size, arm):
        """Whether an arm's experts a token, and so its FLOPs and seconds, are only known from
        training.
        """
        return experts_per_token(self.suite.config(size, arm, 0)) is None

    def is_comparable(self, size, arm):
        """Whether the losses of an arm compare with those of others: not where experts choose among
        later tokens.
        """
        experts = self.suite.config(size, arm, 0).experts
        return not LAYERS[experts.kind].selects or SELECTIONS[experts.selection].causal

    def reference(self, arm):
        """The arm that the differences of an arm are to."""
        return self.suite.arms[arm].reference or self.suite.baseline

    def budget(self, size, arms, kind):
        """What arms of a size have spent at least, of "flops" or "seconds"; nan if one takes what
        it needs or hasn't run.
        """
        if any(self.takes_what_it_needs(size, arm) for arm in arms):
            return math.nan
        spent = [
            r.run.config.train.steps * r.per_step(kind)
            for arm in arms
            for r in self.finished(size, arm)
        ]
        return min(spent) if all(self.finished(size, arm) for arm in arms) else math.nan

    def nlls(self, size, arm, kind="end", budget=None):
        """`{seed: validation nll}` of an arm after the last step, or where its curve meets a budget
        of `kind`.
        """
        if kind == "end":
            return {r.run.seed: r.nll for r in self.finished(size, arm)}
        found = {
            r.run.seed: at(r.validation.step * r.per_step(kind), r.validation.nll, budget)
            for r in self.finished(size, arm)
        }
        return {seed: nll for seed, nll in found.items() if math.isfinite(nll)}

    def difference(self, size, arm, kind="end", to=None):
        """The `Difference` of an arm's nll to that of another, of its reference where none is
        named, seed by seed.

        A budget is what the one of the two that takes less has spent at its end. Of no seed where
        one isn't comparable.
        """
        to = to or self.reference(arm)
        if not (self.is_comparable(size, arm) and self.is_comparable(size, to)):
            return paired_difference({}, {})
        budget = None if kind == "end" else self.budget(size, (arm, to), kind)
        return paired_difference(*(self.nlls(size, one, kind, budget) for one in (arm, to)))

    @functools.cached_property
    def budgets_of_flops(self):
        """The lists of sizes, three or more, that cost the baseline equal FLOPs."""
        flops = {r.run.size: r.run.flops for r in self.results if r.run.arm == self.suite.baseline}
        lists = []
        for size in sorted(flops, key=flops.get):
            if lists and flops[size] <= EQUAL_FLOPS * flops[lists[-1][0]]:
                lists[-1].append(size)
            else:
                lists.append([size])
        return [
            [size for size in self.suite.sizes if size in sizes]
            for sizes in lists
            if len(sizes) > 2
        ]

    def isoflops(self, sizes):
        """`{arm: IsoFlops}` of a list of `budgets_of_flops`, for arms that it costs equal FLOPs
        too.
        """
        found = {}
        for arm in self.suite.arms:
            results = [r for size in sizes for r in self.finished(size, arm)]
            flops, groups = [r.run.flops for r in results], {}
            for result in results:
                groups.setdefault(_x(result, "active_non_embedding"), []).append(result.nll)
            fit = fit_parabola(groups)
            if fit and max(flops) <= EQUAL_FLOPS * min(flops):
                found[arm] = IsoFlops(mean(flops).value, groups, fit)
        return found

    def points(self, scale):
        """`{arm: {x: [nll of each seed]}}`, `scale` a key of `SCALES`; arms with two sizes at
        least, and no two of one x.

        Without sizes of equal FLOPs, which differ in what they spend them on.
        """
        iso, found = set().union(*self.budgets_of_flops), {}
        for arm in self.suite.arms:
            groups, n_sizes = {}, 0
            for size in self.suite.sizes:
                results = self.finished(size, arm) if size not in iso else ()
                n_sizes += bool(results)
                for result in results:
                    groups.setdefault(_x(result, scale), []).append(result.nll)
            if len(groups) == n_sizes > 1:
                found[arm] = groups
        return found

    def fits(self, scale):
        """`{arm: Fit}` over the points of a scale."""
        return {arm: fit_power_law(groups) for arm, groups in self.points(scale).items()}

    def balance_of(self, size, arm):
        """`(layer, balance)` in words: what the layers of an arm are, and what evens the load; None
        without a choice.
        """
        config = self.suite.config(size, arm, 0)
        b, e, kind = config.balance, config.experts, LAYERS[config.experts.kind]
        if not kind.selects:
            return None
        layer = (
            kind.in_words(e)
            + ", factorised gate" * e.factorised_gate
            + ", large router" * e.large_router
        )
        if e.top_k != self.suite.config(size, self.suite.baseline, 0).experts.top_k:
            layer += f", K={e.top_k}"
        layer += f", {e.selection.replace('_', ' ')}" * (e.selection != "top_k")
        layer += f", gate={e.gate}" * (e.gate != "chosen")
        aux = "L_aux" + " of each sequence" * (b.aux_batch == "sequence")
        parts = [
            (SELECTIONS[e.selection].balances_by, True),
            (aux, b.aux_weight),
            ("Ent_conf", b.entropy_weight),
        ]
        parts += [
            ("z-loss", b.z_weight),
            ("loss-free bias", b.bias_rate),
            ("L_ERC", b.coupling_weight),
        ]
        return layer, " + ".join(name for name, value in parts if name and value) or "nothing"

    def spread(self, size, arm, figure):
        """The `Mean` over seeds of a figure of a `Result`, a function of it; nan where it has none."""
        values = [figure(result) for result in self.finished(size, arm)]
        return mean(value for value in values if value is not None and math.isfinite(value))


def _x(result, scale):
    if scale == "flops":
        return result.run.flops
    return parameter_counts(result.run.config).active_non_embedding
