"""The configuration of a run: all groups, their joint checks, and conversion from and to dicts."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field

from aoe_jax.config import VERSION
from aoe_jax.config.checks import did_you_mean, misfit, require, require_choice
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.errors import UserError
from aoe_jax.methods import LAYERS, ROUTERS, find_method, is_in_file
from aoe_jax.moe.routing import Method, TopK


@dataclass(frozen=True)
class Config:
    """The configuration of a whole run.

    `routing` is the router if `experts.kind` is "aoe" or "router". For any other kind it is the
    layer of `aoe_jax/methods/` whose name is the kind. It has the settings of this method only.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    routing: Method = field(default_factory=TopK)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        kind = self.experts.kind
        require_choice("experts.kind", kind, ("aoe", "router", *LAYERS))
        if kind in LAYERS and self.routing == TopK():  # replace the default
            object.__setattr__(self, "routing", find_method(kind)())
        choices, name = (kind,) if kind in LAYERS else tuple(ROUTERS), self.routing.name
        if kind in LAYERS or not is_in_file(name):
            require_choice("routing.name", name, choices)
        rank = self.experts.rank(self.model.d_model)
        object.__setattr__(self, "experts", dataclasses.replace(self.experts, d_low=rank))
        given = self.data.tokenizer or "prepared" in {source.name for source in self.data.sources}
        if self.model.vocab_size is None and not given:  # training makes the tokenizer
            object.__setattr__(self, "model", dataclasses.replace(self.model, vocab_size=4096))
        for f in dataclasses.fields(self):
            getattr(self, f.name).check(self)

    @property
    def tokens_per_step(self):
        """Tokens of a training step, over all devices."""
        return self.train.batch_size * self.data.seq_len

    @property
    def rate_factor(self):
        """The factor of both learning rates by `train.rate_width`."""
        return (self.train.rate_width or self.model.d_model) / self.model.d_model

    @classmethod
    def from_config_dict(cls, config):
        """Builds a `Config` from nested mappings. Raises `UserError` for any wrong field."""
        classes = {f.name: f.type for f in dataclasses.fields(cls)}
        _refuse_unknown(config, classes)
        groups = {name: dict(values) for name, values in config.items()}
        if "routing" in groups:
            kind = groups.get("experts", {}).get("kind", ExpertsConfig.kind)
            default = kind if kind in tuple(LAYERS) else TopK.name
            classes["routing"] = find_method(groups["routing"].pop("name", default))
        return cls(**{name: _build(classes[name], values) for name, values in groups.items()})

    @classmethod
    def for_training(cls, config):
        """As `from_config_dict`; also raises `UserError` if the method cannot be trained."""
        config = cls.from_config_dict(config)
        config.routing.check_training()
        return config

    @classmethod
    def from_stored(cls, stored):
        """Builds a `Config` from a `to_stored` result of any version. Raises `UserError`."""
        from aoe_jax.config.versions import upgraded  # a new run does not need it

        return cls.from_config_dict(upgraded(stored))

    def to_stored(self):
        """The content of a configuration file: the fields of `to_dict`, and the version."""
        return {"version": VERSION} | self.to_dict()

    def to_dict(self):
        """A nested dict for JSON; tuples become lists."""
        groups = dataclasses.asdict(self)
        groups["routing"] = {"name": self.routing.name} | groups["routing"]
        return json.loads(json.dumps(groups))


def field_types():
    """Returns the types of all fields but those of `routing`, `{group: {field: (type, ...)}}`."""
    return {f.name: types_of(f.type) for f in dataclasses.fields(Config) if f.name != "routing"}


def types_of(group):
    """Returns the types of the fields of a group's class, `{field: (type, ...)}`."""
    hints = typing.get_type_hints(group)  # also of a file with `from __future__ import annotations`
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(group)}
    return {name: typing.get_args(kind) or (kind,) for name, kind in kinds.items()}


def _refuse_unknown(given, known, prefix=""):
    for name in given:
        if name not in known:
            wanted = f"known are {', '.join(known)}{did_you_mean(name, known)}"
            raise UserError(f"config.{prefix}{name[:1000]} is unknown; {wanted}")


def _build(group, values):
    known, typed = types_of(group), {}
    chosen = {f.name for f in dataclasses.fields(group) if f.metadata.get("choices")}
    _refuse_unknown(values, known, f"{group.group}.")
    for name, value in values.items():
        kinds, field = known[name], f"{group.group}.{name}"
        if tuple in kinds and type(value) is list:  # JSON has no tuples
            value = tuple(value)
        for part in value if type(value) is tuple else (value,):
            require(not misfit(part), field, value, misfit(part))
        if float in kinds and type(value) is int:
            value = float(value)
        if name not in chosen:  # the group itself checks choices
            names = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
            require(type(value) in kinds, field, value, f"must be of type {names}")
        typed[name] = value
    return group(**typed)
