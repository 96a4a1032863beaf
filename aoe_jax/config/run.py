"""A whole run: all groups, checked one by one and together, from and to plain dicts."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field

import ml_collections
from ml_collections import config_dict

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.checks import require_choice
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.errors import UserError
from aoe_jax.methods import LAYERS, ROUTERS
from aoe_jax.moe.routing import Method, TopK

ROUTED_KINDS = ("aoe", "router")  # kinds of layer that have a router; others are the method itself
# Fields that have gone, and what stands for them.
RENAMED = {
    "experts.selection": "routing.name",
    "experts.gate": "routing.norm_topk_prob (or routing.name='sparsemixer')",
    "experts.top_p": "routing.p, with routing.name='top_p'",
    "experts.capacity_factor": "routing.capacity_factor",
    "experts.ranks": "routing.ranks, with routing.name='ranked'",
    "experts.router_jitter": "routing.jitter, with routing.name='sparsemixer'",
    "train.warmup_steps": "train.warmup, a share of train.steps",
    "balance.coupling_weight": "routing.weight, with routing.name='erc'",
    "balance.coupling_alpha": "routing.alpha, with routing.name='erc'",
    "top_any": "routing, with routing.name='dynmoe'",
    "by_attention": "routing, with routing.name='da_moe'",
    **{
        name: f"routing, with routing.name={name!r}"
        for name in ("threshold", "routing_free", "gshard", "uoe", "smear", "thor")
    },
}


@dataclass(frozen=True)
class Config:
    """A whole run.

    `routing` is the router of `experts.kind` "aoe" or "router"; for any other kind it is the layer
    itself, with its settings. A run holds the settings of this one method only.
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
        require_choice("experts.kind", kind, (*ROUTED_KINDS, *LAYERS))
        if kind in LAYERS and self.routing == TopK():  # the default: nothing was chosen
            object.__setattr__(self, "routing", LAYERS[kind]())
        choices = (kind,) if kind in LAYERS else tuple(ROUTERS)
        require_choice("routing.name", self.routing.name, choices)
        for f in dataclasses.fields(self):
            getattr(self, f.name).check(self)

    @property
    def tokens_per_step(self):
        """Tokens of a training step, over all devices."""
        return self.train.batch_size * self.data.seq_len

    @classmethod
    def from_config_dict(cls, config):
        """Checks a `ConfigDict` (or nested dict) field by field.

        Raises:
          UserError: an unknown group or field, a value of the wrong type, or one that is not
            allowed.
        """
        groups = {f.name: f.type for f in dataclasses.fields(cls)}
        _refuse_unknown(dict(config), groups, "")
        given = {name: dict(config[name]) for name in groups if name in config}
        if "routing" in given:
            kind = given.get("experts", {}).get("kind", ExpertsConfig.kind)
            groups["routing"], given["routing"] = _method(kind, given["routing"])
        return cls(**{name: _build(groups[name], name, values) for name, values in given.items()})

    def to_dict(self):
        """A nested plain dict, as JSON gives it back."""
        groups = dataclasses.asdict(self)
        groups["routing"] = {"name": self.routing.name} | groups["routing"]
        return {
            name: {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            for name, values in groups.items()
        }


def _method(kind, values):
    """`(class, values)` of the group `routing`, without its name."""
    default = {"name": TopK.name} | dataclasses.asdict(TopK())
    name = values.pop("name", TopK.name)
    if kind in LAYERS and name == TopK.name and {"name": name} | values == default:
        return LAYERS[kind], {}
    methods = ROUTERS | LAYERS
    require_choice("routing.name", name, tuple(methods))
    if name != TopK.name:  # the name was set alone, over the default group
        ours = {f.name for f in dataclasses.fields(methods[name])}
        unset = [key for key, value in values.items() if default.get(key) == value]
        values = {k: v for k, v in values.items() if k in ours or k not in unset}
    return methods[name], values


def _refuse_unknown(given, known, prefix):
    for name in given:
        if name in known:
            continue
        if instead := RENAMED.get(prefix + name):
            raise UserError(f"config.{prefix}{name} is gone; set config.{instead}")
        raise UserError(f"config.{prefix}{name} is unknown; known are {', '.join(known)}")


def _build(group, group_name, values):
    hints = {f.name: typing.get_type_hints(group)[f.name] for f in dataclasses.fields(group)}
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
        if group.name != "routing":
            config[group.name] = _group_dict(group.type)
    config.routing = routing_dict(TopK.name)
    return config


def routing_dict(name, **settings):
    """The group `routing` of a router or layer: its defaults, with `settings`.

    Raises:
      UserError: the name or a setting is unknown, or a setting is of the wrong type.
    """
    methods = ROUTERS | LAYERS
    require_choice("routing.name", name, tuple(methods))
    values = _group_dict(methods[name])
    _refuse_unknown(settings, values, "routing.")
    for key, value in settings.items():
        try:
            values[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as e:
            kind = type(values[key]).__name__
            raise UserError(f"config.routing.{key}={value!r}: must be of type {kind}") from e
    values.name = name
    return values


def update_groups(config, changes):
    """Changes a `ConfigDict`: `{group: {field: value}}`. The group `routing` is replaced whole."""
    for group, values in changes.items():
        if group == "routing":
            config.routing = routing_dict(**values)
        else:
            config[group].update(values)


def _group_dict(group):
    hints = typing.get_type_hints(group)
    values = ml_collections.ConfigDict()
    for f in dataclasses.fields(group):
        if isinstance(hints[f.name], types.UnionType):
            values[f.name] = config_dict.placeholder(typing.get_args(hints[f.name])[0])
        else:
            values[f.name] = f.default
    return values
