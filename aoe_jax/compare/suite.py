"""Defines suites of runs (every arm at every size with every seed), and sweeps of step costs.

A suite file has a function `get_suite()` that returns a `Suite`. `configs/compare/` has examples.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from aoe_jax.config.checks import choose, require_flag
from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import with_vocabulary
from aoe_jax.errors import UserError, naming, running
from aoe_jax.model.counts import parameter_counts
from aoe_jax.storage.config_files import call_in_file, shipped

TOLERANCE = 0.01  # largest relative difference in total parameters of matched arms


@dataclass(frozen=True)
class Arm:
    """One of the models or methods that a suite compares."""

    label: str  # name in the report
    # Group -> field -> value, or a function that maps the size's `ConfigDict` to such a mapping.
    changes: Mapping | Callable[[ConfigDict], Mapping] = field(default_factory=dict)
    matched: bool = True  # False: its total parameters may differ; the report says so
    reference: str | None = None  # arm to compare this arm with; None: the suite's baseline

    def changes_of(self, config: ConfigDict) -> Mapping:
        return self.changes(config) if callable(self.changes) else self.changes


@dataclass(frozen=True)
class Size:
    """A model size at which arms are compared."""

    changes: Mapping  # group -> field -> value
    seeds: int  # number of seeds; a seed decides initial parameters and data order
    arms: tuple[str, ...] | None = None  # None: all
    seeds_of: Mapping[str, int] = field(default_factory=dict)  # arm -> its own number of seeds


@dataclass(frozen=True)
class Sweep:
    """Measures the cost of a step of each arm at several values of a setting, without training."""

    setting: str  # GROUP.FIELD, such as experts.n_experts
    values: tuple
    changes: Mapping  # group -> field -> value, applied to the base
    arms: tuple[str, ...] | None = None  # None: all


@dataclass(frozen=True)
class Run:
    """A training run of a suite."""

    size: str
    arm: str
    seed: int
    config: Config

    @property
    def name(self):
        """SIZE/ARM/seed_N, which is also the path of the run below `WORKDIR/runs`."""
        return f"{self.size}/{self.arm}/seed_{self.seed}"


@dataclass(frozen=True)
class Suite:
    """One run for each arm, size and seed: `base` with the changes of the size and of the arm. With
    equal seeds, all arms of a size get the same batches in the same order.
    """

    name: str
    base: ConfigDict
    arms: Mapping[str, Arm]
    sizes: Mapping[str, Size]
    baseline: str  # arm to compare the others with, unless they have a `reference`
    throughput: Mapping[str, Sweep] = field(default_factory=dict)
    routing_tokens: int = 16_384  # minimum number of validation tokens to analyse routing
    # Group -> field -> value for all runs; these override the changes of sizes and arms.
    settings: Mapping = field(default_factory=dict)

    def __post_init__(self):
        """Checks names and values; `runs` and `swept` check configurations. Raises `UserError`."""
        self._require(self.sizes or self.throughput, "sizes", self.sizes, "must not be empty")
        for name in (*self.arms, *self.sizes, *self.throughput):  # these become names of files
            is_plain = re.fullmatch(r"[\w.+-]+", name)
            self._require(is_plain, "name", name, "must have letters, digits, . + - _ only")
        for name, size in self.sizes.items():
            place = f"sizes[{name!r}].seeds"
            for seeds in (size.seeds, *size.seeds_of.values()):
                is_count = type(seeds) is int and seeds > 0
                self._require(is_count, place, seeds, "must be a whole number above 0")
            for arm in size.seeds_of:
                self._require(arm in self.arms, f"{place}_of", arm, choose(arm, self.arms))
            self._check_arms(f"sizes[{name!r}].arms", size)
        for name, sweep in self.throughput.items():
            is_list = isinstance(sweep.values, tuple | list)
            self._require(is_list, f"throughput[{name!r}].values", sweep.values, "must be a tuple")
            self._check_arms(f"throughput[{name!r}].arms", sweep)

    def _require(self, condition, name, value, wanted):
        if not condition:
            raise UserError(f"suite {self.name}: {name}={value!r}: {wanted}")

    def _check_arms(self, place, of):
        present = self.arms_of(of)
        for arm in (*(of.arms or ()), self.baseline, *map(self.reference, present)):
            self._require(arm in self.arms, place, arm, choose(arm, self.arms))
            wanted = "is the baseline or a reference of these arms; add it to them"
            self._require(arm in present, place, arm, wanted)

    def arms_of(self, of: Size | Sweep):
        """Returns the names of the arms of a size or of a sweep."""
        return [arm for arm in self.arms if of.arms is None or arm in of.arms]

    def of_arms(self, arms):
        """Returns a suite of `arms` and the arms that they are compared with, without sweeps. Sizes
        without any of `arms` are left out. Raises `UserError` for an unknown arm.
        """
        for arm in arms:
            require_flag(arm in self.arms, "arms", arm, choose(arm, self.arms))
        wanted, sizes = {self.baseline, *arms, *map(self.reference, arms)}, {}
        for name, size in self.sizes.items():
            there = tuple(arm for arm in self.arms_of(size) if arm in wanted)
            seeds = {arm: size.seeds_of.get(arm, size.seeds) for arm in arms if arm in there}
            if seeds:  # the others need no more seeds than these
                seeds = dict.fromkeys(there, max(seeds.values())) | seeds
                sizes[name] = dataclasses.replace(size, arms=there, seeds_of=seeds)
        return dataclasses.replace(self, sizes=sizes, throughput={})

    def reference(self, arm):
        return self.arms[arm].reference or self.baseline

    def _config(self, place, arm, changes, last):
        """Returns the `Config` of an arm; `last` overrides the arm and the settings."""
        with naming(f"suite {self.name}, {place}, arm {arm}"):
            with running("its changes", None, "changes"):
                groups = _changed(self.base.to_dict(), changes, last)
                own = self.arms[arm].changes_of(ConfigDict(groups))
                groups = _changed(groups, own, self.settings, last)
            return with_vocabulary(Config.for_training(groups))

    def runs(self):
        """Returns all runs, size by size and seed by seed; the first seed is `base.train.seed`.

        Raises `UserError` if a configuration is invalid, if the arms of a size differ in `_recipe`,
        or if matched arms differ in total parameters.
        """
        runs, first_seed = [], self.base.train.seed
        for name, size in self.sizes.items():
            seeds = {arm: size.seeds_of.get(arm, size.seeds) for arm in self.arms_of(size)}
            for seed in range(first_seed, first_seed + max(seeds.values())):
                arms = [arm for arm, n in seeds.items() if seed < first_seed + n]
                place, last = f"size {name}", {"train": {"seed": seed}}
                configs = {arm: self._config(place, arm, size.changes, last) for arm in arms}
                if seed == first_seed:  # of all arms
                    self._check_matched(place, configs)
                runs += [Run(name, arm, seed, config) for arm, config in configs.items()]
        return runs

    def swept(self, name):
        """Returns `{value: {arm: Config}}` of a sweep; raises `UserError` as `runs` does."""
        sweep, found = self.throughput[name], {}
        group, _, field_name = sweep.setting.partition(".")
        for value in sweep.values:
            place = f"throughput {name}, {sweep.setting}={value}"
            last, arms = {group: {field_name: value}}, self.arms_of(sweep)
            found[value] = {arm: self._config(place, arm, sweep.changes, last) for arm in arms}
            self._check_matched(place, found[value])
        return found

    def _check_matched(self, place, configs):
        totals = {arm: parameter_counts(config).total for arm, config in configs.items()}
        wanted, recipe = totals[self.baseline], _recipe(configs[self.baseline])
        for arm, total in totals.items():
            own = _recipe(configs[arm])
            differing = [name for name in own if own[name] != recipe[name]]
            if differing:
                raise UserError(
                    f"suite {self.name}, {place}: arm {arm} has another config.{differing[0]} "
                    f"than {self.baseline}; all arms of a size need one recipe and the same data"
                )
            if self.arms[arm].matched and abs(total / wanted - 1) > TOLERANCE:
                raise UserError(
                    f"suite {self.name}, {place}: arm {arm} has {total:,} parameters, "
                    f"{self.baseline} {wanted:,}: more than {TOLERANCE:.0%} apart. "
                    "Change its width, or give it matched=False"
                )


def _recipe(config):
    """Returns what must be equal in all arms of a size: `data`, and `train` without the optimiser
    and its rates.
    """
    groups = config.to_dict()
    return {
        f"{group}.{name}": value
        for group in ("train", "data")
        for name, value in groups[group].items()
        if not name.endswith(("optimizer", "learning_rate", "scoring_rate"))
    }


def _changed(groups, *changes):
    """Returns `groups` with changes; a change of `routing.name` replaces the group `routing`."""
    groups = dict(groups)
    for change in changes:
        for name, values in change.items():
            is_new = name == "routing" and "name" in values
            before = {} if is_new else groups.get(name, {})
            groups[name] = {**before, **values}
    return groups


def load_suite(path: Path, settings=()) -> Suite:
    """Loads the suite of a Python file with `get_suite()`, or `aoe_jax:NAME` of `configs/compare`.

    `settings` are `GROUP.FIELD=VALUE` for all runs; VALUE is JSON or plain text. A field that an
    arm sets is refused, because the arm's label may state another value. Raises `UserError` if the
    file, the suite or a setting is invalid.
    """
    file = shipped("--suite", str(path), "compare")
    suite = call_in_file(f"--suite={path}", file, "get_suite")
    wanted = "get_suite() must return an aoe_jax.compare.suite.Suite"
    require_flag(isinstance(suite, Suite), "suite", path, wanted)
    for setting in settings:
        name, equals, text = setting.partition("=")
        group, _, field_name = name.partition(".")
        wanted = "write it as GROUP.FIELD=VALUE, such as data.path=/data/c4"
        require_flag(equals and field_name, "set", setting, wanted)
        with running(f"--suite={path}", file, "changes"):
            changes = [arm.changes_of(suite.base).get(group, {}) for arm in suite.arms.values()]
        is_set = name == "train.seed" or any(field_name in change for change in changes)
        wanted = "the suite sets it for its runs or arms; change the suite"
        require_flag(not is_set, "set", setting, wanted)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        changed = _changed(suite.settings, {group: {field_name: value}})
        suite = dataclasses.replace(suite, settings=changed)
    return suite
