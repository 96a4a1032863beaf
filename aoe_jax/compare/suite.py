"""What is compared: a suite of arms x sizes x seeds, each a `Config`, and the check that arms are
equal in parameters.
"""

import dataclasses
import importlib.util
import json
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from aoe_jax.compare.sweep import SWEPT, Sweep
from aoe_jax.config import Config
from aoe_jax.counts import parameter_counts, training_flops_per_token
from aoe_jax.errors import UserError

TOLERANCE = 0.01  # by which the total parameters of matched arms may differ
TUNING_SEED = (
    1_000_000  # of the order of the data and of the parameters; none of the seeds that count
)


@dataclass(frozen=True)
class Arm:
    """One of the things compared."""

    label: str  # in the report
    # Group -> field -> value; or a function of the size's `ConfigDict` that returns this.
    changes: Mapping | Callable[[ConfigDict], Mapping] = field(default_factory=dict)
    matched: bool = True  # in total parameters with the other arms; where not, the report says so
    reference: str | None = None  # the arm that its differences are to; None: the suite's baseline

    def changes_of(self, config: ConfigDict) -> Mapping:
        """The changes at a size."""
        return self.changes(config) if callable(self.changes) else self.changes


@dataclass(frozen=True)
class Size:
    """A size that arms are compared at."""

    changes: Mapping  # group -> field -> value
    seeds: int  # 0, 1, ...: each sets the parameters at the start and the order of the data
    arms: tuple[str, ...] | None = None  # None: all
    rate_factor: float = 1.0  # learning rates that tuning has found are multiplied by it


@dataclass(frozen=True)
class Tuning:
    """A search for the learning rate of each arm, by validation nll at one size;
    `final_learning_rate` keeps pace.
    """

    learning_rates: tuple[float, ...]
    steps: int
    size: str | None = None  # None: the first


@dataclass(frozen=True)
class Run:
    """A training run of a suite."""

    size: str
    arm: str
    seed: int
    config: Config

    @property
    def name(self):
        """SIZE/ARM/seed_N: also where it lies below `WORKDIR/runs`."""
        return f"{self.size}/{self.arm}/seed_{self.seed}"

    @property
    def flops(self):
        """Useful FLOPs of the whole training."""
        return (
            training_flops_per_token(self.config)
            * self.config.train.steps
            * self.config.tokens_per_step
        )


@dataclass(frozen=True)
class Suite:
    """Arms x sizes x seeds over a common `base`; the arms of a size see the same data in the same
    order.
    """

    name: str
    base: ConfigDict
    arms: Mapping[str, Arm]
    sizes: Mapping[str, Size]
    baseline: str  # the arm that differences are to, but for arms that name another
    tuning: Tuning | None = None
    throughput: Mapping[str, Sweep] = field(default_factory=dict)
    routing_tokens: int = 16_384  # of the validation split, at least, that routing is looked at on
    settings: Mapping = field(
        default_factory=dict
    )  # group -> field -> value, of all runs, whatever size and arm say

    def __post_init__(self):
        """Checks what can be seen without resolving configurations; raises `UserError`."""
        kinds = (
            ("arms", self.arms, Arm),
            ("sizes", self.sizes, Size),
            ("throughput", self.throughput, Sweep),
        )
        for kind, named, cls in kinds:
            needed = kind == "arms" or (kind == "sizes" and (self.tuning or not self.throughput))
            ok = isinstance(named, Mapping) and (named or not needed)
            _require(ok, self, kind, named, f"must name at least one {cls.__name__}")
            for name, value in named.items():
                ok = (
                    isinstance(name, str)
                    and re.fullmatch(r"[\w.+-]+", name)
                    and isinstance(value, cls)
                )
                _require(
                    ok,
                    self,
                    kind,
                    {name: value},
                    f"must be a {cls.__name__} by a name of letters, digits, . + - _",
                )
        _require(
            self.baseline in self.arms,
            self,
            "baseline",
            self.baseline,
            f"choose one of {', '.join(self.arms)}",
        )
        for name, size in self.sizes.items():
            for what in ("seeds", "rate_factor"):
                value = getattr(size, what)
                _require(
                    value > 0, self, f"sizes[{name!r}].{what}", value, "must be greater than 0"
                )
            self._check_arms(f"sizes[{name!r}].arms", size)
        if self.tuning:
            known, place = self.tuning_size in self.sizes, "tuning.size"
            _require(known, self, place, self.tuning.size, f"choose one of {', '.join(self.sizes)}")
            place, factor = (
                f"sizes[{self.tuning_size!r}].rate_factor",
                self.sizes[self.tuning_size].rate_factor,
            )
            _require(
                factor == 1,
                self,
                place,
                factor,
                "must be 1, for learning rates are tuned at this size",
            )
        for name, sweep in self.throughput.items():
            self._check_arms(f"throughput[{name!r}].arms", sweep)
            known, place = sweep.setting in SWEPT, f"throughput[{name!r}].setting"
            _require(known, self, place, sweep.setting, f"choose one of {', '.join(SWEPT)}")
            _require(
                len(sweep.values) > 1,
                self,
                f"throughput[{name!r}].values",
                sweep.values,
                "must be two or more",
            )

    def _check_arms(self, place, of):
        for name in self._arms(of):
            to = self.arms[name].reference
            known = self._arms(of)
            _require(
                to is None or to in known,
                self,
                f"arms[{name!r}].reference",
                to,
                f"choose one of {', '.join(known)}",
            )
        unknown = [arm for arm in of.arms or () if arm not in self.arms]
        _require(not unknown, self, place, unknown, f"choose of {', '.join(self.arms)}")
        there = self.baseline in self._arms(of)
        _require(there, self, place, of.arms, f"must have the baseline {self.baseline!r}")

    def _arms(self, of):
        return [arm for arm in self.arms if of.arms is None or arm in of.arms]

    def arms_of(self, size):
        """The names of the arms that a size has, in the order of the suite."""
        return self._arms(self.sizes[size])

    def config(self, size, arm, seed, learning_rate=None):
        """The `Config` of a run; `learning_rate` replaces the peak, and the final one in
        proportion.

        Raises:
          UserError: it can't be; names size and arm.
        """
        try:
            config = self._resolved(arm, self.sizes[size].changes)
            if learning_rate is not None:
                config.train.final_learning_rate *= learning_rate / config.train.learning_rate
                config.train.learning_rate = learning_rate
            config.train.seed = seed
            return Config.from_config_dict(config)
        except UserError as e:
            raise UserError(f"suite {self.name}, size {size}, arm {arm}: {e}") from e

    def _resolved(self, arm, *changes_before):
        """The `ConfigDict` of an arm on the base with changes."""
        config = self.base.copy_and_resolve_references()
        for changes in changes_before:
            _change(config, changes)
        _change(config, self.arms[arm].changes_of(config))
        _change(config, self.settings)
        return config

    def swept(self, name):
        """`{value: {arm: Config}}` of a sweep.

        Raises:
          UserError: as in `runs`; names sweep, value and arm.
        """
        sweep, found = self.throughput[name], {}
        for value in sweep.values:
            place, found[value] = f"throughput {name}, {sweep.setting}={value}", {}
            for arm in self._arms(sweep):
                try:
                    batch_size = self._resolved(arm, sweep.changes).train.batch_size
                    at_value = sweep.changes_at(value, batch_size)
                    config = self._resolved(arm, sweep.changes, at_value)
                    _change(config, at_value)  # again, for the arm or a setting may say otherwise
                    found[value][arm] = Config.from_config_dict(config)
                except UserError as e:
                    raise UserError(f"suite {self.name}, {place}, arm {arm}: {e}") from e
            self._check_matched(place, found[value])
        return found

    def runs(self, learning_rates=None):
        """All runs, the first size first, seed by seed; `learning_rates`: peaks by arm, of the
        tuning.

        Raises:
          UserError: as in `config`, or arms of a size differ in their recipe, or matched ones in
            total parameters.
        """
        learning_rates = learning_rates or {}
        runs = [
            Run(
                size,
                arm,
                seed,
                self.config(size, arm, seed, self._rate(size, learning_rates.get(arm))),
            )
            for size in self.sizes
            for seed in range(self.sizes[size].seeds)
            for arm in self.arms_of(size)
        ]
        for size in self.sizes:
            self._check_matched(
                f"size {size}", {arm: self.config(size, arm, 0) for arm in self.arms_of(size)}
            )
        return runs

    def _rate(self, size, tuned):
        return None if tuned is None else tuned * self.sizes[size].rate_factor

    @property
    def tuning_size(self):
        """The size that learning rates are tuned at."""
        return self.tuning.size or next(iter(self.sizes))

    def tuning_runs(self):
        """`{(arm, learning rate): Run}` of the tuning; empty without one."""
        if self.tuning is None:
            return {}
        size, found = self.tuning_size, {}
        for arm in self.arms_of(size):
            for rate in self.tuning.learning_rates:
                groups = self.config(size, arm, TUNING_SEED, rate).to_dict()
                groups["train"] |= {"steps": self.tuning.steps, "eval_every": 0}
                groups["checkpoint"] |= {"keep": 1, "keep_every": 0, "keep_best": 0}
                found[arm, rate] = Run(
                    f"rate_{rate:g}", arm, TUNING_SEED, Config.from_config_dict(groups)
                )
        return found

    def _check_matched(self, place, configs):
        totals = {arm: parameter_counts(config).total for arm, config in configs.items()}
        wanted, recipe = totals[self.baseline], _recipe(configs[self.baseline])
        for arm, total in totals.items():
            if differing := [
                name for name, value in _recipe(configs[arm]).items() if value != recipe[name]
            ]:
                raise UserError(
                    f"suite {self.name}, {place}: arm {arm} has another config.{differing[0]} than {self.baseline}; "
                    "all arms of a size have one recipe and the same data"
                )
            if self.arms[arm].matched and abs(total / wanted - 1) > TOLERANCE:
                raise UserError(
                    f"suite {self.name}, {place}: arm {arm} has {total:,} parameters, {self.baseline} {wanted:,}: "
                    f"more than {TOLERANCE:.0%} apart. Change its width, or give it matched=False"
                )


def _recipe(config):
    """What all arms of a size have alike: training but for the learning rate, and data."""
    found = {
        f"{group}.{name}": value
        for group in ("train", "data")
        for name, value in config.to_dict()[group].items()
    }
    return {name: value for name, value in found.items() if not name.endswith("learning_rate")}


def load_suite(path: Path, settings=()) -> Suite:
    """The suite of a file with `get_suite()`.

    Args:
      path: a Python file.
      settings: `GROUP.FIELD=VALUE` for all runs, VALUE as in JSON, or a word.

    Raises:
      UserError: the file can't be read, is no suite, or the suite can't be.
    """
    try:
        spec = importlib.util.spec_from_file_location("suite", path)
        if spec is None:
            raise UserError(
                f"--suite={path}: must be a Python file, such as configs/compare/tiny.py"
            )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        get_suite = getattr(module, "get_suite", None)
        suite = get_suite() if callable(get_suite) else None
    except UserError as e:
        raise UserError(f"--suite={path}: {e}") from e
    except OSError as e:
        raise UserError(
            f"--suite={path}: can't be read ({e.strerror}); name a file such as configs/compare/tiny.py"
        ) from e
    except Exception as e:  # a suite is code: whatever is wrong with it shows here
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == str(path)
        ]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(
            f"--suite={path}: {type(e).__name__}: {' '.join(str(e).split())[:300]}{where}"
        ) from e
    if not isinstance(suite, Suite):
        raise UserError(
            f"--suite={path}: needs a function get_suite() that returns an aoe_jax.compare.suite.Suite"
        )
    for setting in settings:
        suite = _with_setting(suite, setting)
    return suite


def _with_setting(suite, setting):
    """The suite with a setting for all runs."""
    name, equals, text = setting.partition("=")
    group, _, field_name = name.partition(".")
    if not (equals and field_name):
        raise UserError(
            f"--set={setting}: write it as GROUP.FIELD=VALUE, such as data.path=/data/c4"
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text

    if name == "train.seed" or (name == "train.learning_rate" and suite.tuning):
        raise UserError(f"--set={setting}: the suite sets it for each run; change the suite")
    of_group = {**suite.settings.get(group, {}), field_name: value}
    return dataclasses.replace(suite, settings={**suite.settings, group: of_group})


def _change(config, changes):
    """Applies group -> field -> value; unknown names are left to `Config` to refuse, which knows
    what is there.
    """
    for group, values in changes.items():
        if group not in config:
            raise UserError(f"config.{group} is unknown; known are {', '.join(config)}")
        for name, value in values.items():
            if name not in config[group]:
                raise UserError(
                    f"config.{group}.{name} is unknown; known are {', '.join(config[group])}"
                )
            try:
                config[group][name] = value
            except TypeError as e:
                raise UserError(
                    f"config.{group}.{name}={value!r}: must be of type {type(config[group][name]).__name__}"
                ) from e


def _require(condition, suite, name, value, wanted):
    if not condition:
        raise UserError(f"suite {suite.name}: {name}={value!r}: {wanted}")
