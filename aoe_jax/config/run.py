"""A whole run: all groups, checked one by one and together, from and to plain dicts."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field

import ml_collections
from ml_collections import config_dict

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.checks import require
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import KIND_NAMES, ExpertsConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.methods import (
    METHODS,
    ByAttentionConfig,
    GShardConfig,
    RoutingFreeConfig,
    SmearConfig,
    ThorConfig,
    ThresholdConfig,
    TopAnyConfig,
    UoEConfig,
)
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.errors import UserError


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    uoe: UoEConfig = field(default_factory=UoEConfig)
    top_any: TopAnyConfig = field(default_factory=TopAnyConfig)
    routing_free: RoutingFreeConfig = field(default_factory=RoutingFreeConfig)
    gshard: GShardConfig = field(default_factory=GShardConfig)
    by_attention: ByAttentionConfig = field(default_factory=ByAttentionConfig)
    smear: SmearConfig = field(default_factory=SmearConfig)
    thor: ThorConfig = field(default_factory=ThorConfig)

    @property
    def method_name(self):
        """The name of the layer kind or selection method that has a group of its own; None where
        neither has.
        """
        return next(
            (name for name in (self.experts.kind, self.experts.selection) if name in METHODS), None
        )

    @property
    def method_settings(self):
        """That group; None where there is none."""
        return self.method_name and getattr(self, self.method_name)

    @property
    def tokens_per_step(self):
        """Tokens of a training step, over all devices."""
        return self.train.batch_size * self.data.seq_len

    def __post_init__(self):
        if self.method_name:
            object.__setattr__(self, self.method_name, self.method_settings.filled_in(self.experts))
        for group in (
            self.model,
            self.experts,
            self.balance,
            self.data,
            self.train,
            self.checkpoint,
            self.mesh,
        ):
            group.check(self)
        self._check_methods()

    def _check_methods(self):
        """Checks the settings of the method that is chosen, and refuses those of others."""
        for name, group in METHODS.items():
            settings = getattr(self, name)
            if name == self.method_name:
                settings.check(self)
                continue
            what = "kind" if name in KIND_NAMES else "selection"
            for f in dataclasses.fields(group):
                value = getattr(settings, f.name)
                of_other = f"belongs to experts.{what}={name!r}; leave it at its default"
                require(value == f.default, f"{name}.{f.name}", value, of_other)

    @classmethod
    def from_config_dict(cls, config):
        """Checks a `ConfigDict` (or nested dict) field by field.

        Raises:
          UserError: an unknown group or field, a value of the wrong type, or one that can't be.
        """
        groups = {f.name: f.type for f in dataclasses.fields(cls)}
        _refuse_unknown(dict(config), groups, "")
        return cls(
            **{
                name: _build(group, name, dict(config[name]))
                for name, group in groups.items()
                if name in config
            }
        )

    def to_dict(self):
        """Nested plain dict, as JSON gives it back."""
        groups = dataclasses.asdict(self)
        groups["model"]["rope_factors"] = list(self.model.rope_factors)
        groups["experts"]["ranks"] = list(self.experts.ranks)
        return groups


def _refuse_unknown(given, known, prefix):
    for name in given:
        if name not in known:
            raise UserError(f"config.{prefix}{name} is unknown; known are {', '.join(known)}")


def _build(group, group_name, values):
    hints = typing.get_type_hints(group)
    _refuse_unknown(values, hints, f"{group_name}.")
    return group(
        **{
            name: _typed(f"{group_name}.{name}", value, hints[name])
            for name, value in values.items()
        }
    )


def _typed(name, value, hint):
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if tuple in kinds and type(value) is list:  # as JSON gives it back
        return tuple(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"config.{name}={value!r}: must be of type {wanted}")
    return value


def default_config():
    """The defaults as a `ConfigDict`, for `configs/*.py` to change and the command line to
    override.
    """
    config = ml_collections.ConfigDict()
    for group in dataclasses.fields(Config):
        hints = typing.get_type_hints(group.type)
        values = ml_collections.ConfigDict()
        for f in dataclasses.fields(group.type):
            if isinstance(hints[f.name], types.UnionType):
                values[f.name] = config_dict.placeholder(typing.get_args(hints[f.name])[0])
            else:
                values[f.name] = f.default
        config[group.name] = values
    return config
