"""`config.json` of a model and `aoe_jax.config.Config`: from one to the other."""

import dataclasses
from pathlib import Path

from aoe_jax.config import SELECTION_NAMES, UNSELECTIVE_KINDS, Config
from aoe_jax.config.methods import METHODS
from aoe_jax.errors import UserError
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.formats.architectures import ARCHITECTURES, Architecture

OWN = "aoe"  # the model_type of our own format
WINDOW = 1024  # tokens that texts are scored and trained in, where the model takes as many
# Fields that say how a model is computed, not what.
_EXECUTION = (
    "model.dtype",
    "model.remat",
    "model.unroll",
    "model.max_len",
    "experts.score_gradient",
)
CHOICE = (
    "experts.top_k",
    "experts.selection",
    "experts.top_p",
    "experts.capacity_factor",
    "experts.gate",
)
CHOICE += ("experts.router_jitter", "experts.ranks")


def computed_fields(config: Config):
    """What decides which function of its parameters a model is, `{field: value}`: equal for equal
    functions.
    """
    model, experts = config.model, config.experts
    fields = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    fields |= {f"experts.{name}": value for name, value in dataclasses.asdict(experts).items()}
    if config.method_name:
        settings = config.method_settings
        computed = [
            f.name for f in dataclasses.fields(settings) if not f.metadata.get("training_only")
        ]
        fields |= {f"{config.method_name}.{name}": getattr(settings, name) for name in computed}
    fields |= {"model.n_kv_heads": model.kv_heads, "experts.d_wide": experts.width(model.d_model)}
    idle = {*_EXECUTION, "experts.d_ffn", "experts.round_to"}  # what they come to is d_wide
    if not experts.low_rank and not experts.large_router:
        idle.add("experts.d_low")
    if not experts.selects:
        idle |= {*CHOICE}
    if experts.kind == "dense":
        idle.add("experts.n_experts")
    not_gone_by = {"top_k", "gate"} - set(SELECTIONS[experts.selection].fields)
    idle |= {f"experts.{name}" for name in (*experts.idle_fields, *not_gone_by)}
    return {name: value for name, value in fields.items() if name not in idle}


def is_choice(name):
    """Whether a field says how experts are chosen and weighed: other values fit the same
    parameters.
    """
    return name in CHOICE or name.partition(".")[0] in SELECTION_NAMES


def from_json(path: Path, values: dict):
    """The configuration of a model: `data.seq_len` is `WINDOW` or what its method needs,
    `model.dtype` float32.

    Other groups are at their defaults.

    Args:
      path: of the `config.json`, for errors.
      values: what it holds.

    Raises:
      UserError: an unknown architecture, a field that is missing or can't be, or something that
        isn't implemented here.
    """
    architecture = _architecture(path, values)
    own = values["model_type"] == OWN
    fields = _own_fields(path, values) if own else _hub_fields(path, values, architecture)
    groups = Config().to_dict()
    for name, value in fields.items():
        group, _, name = name.partition(".")
        groups[group][name] = value
    groups["model"]["dtype"] = "float32"
    experts = groups["experts"]
    if experts["kind"] in UNSELECTIVE_KINDS or experts["selection"] in tuple(METHODS):
        groups["balance"]["aux_weight"] = 0.0
    if isinstance(groups["model"]["max_len"], int):
        groups["data"]["seq_len"] = groups["model"]["max_len"]
    try:
        config = Config.from_config_dict(groups)
        least = config.method_settings.least_seq_len if config.method_name else 1
        seq_len = min(max(WINDOW, least), config.model.max_len)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def _architecture(path, values):
    name = values.get("model_type")
    if name is None:
        raise UserError(
            f"{path} has no model_type; `python -m aoe_jax.export` takes the model out of a training run"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type={name!r} is unknown; known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _own_fields(path, values):
    fields = {}
    experts = values.get("experts")
    chosen = (
        [experts.get(name) for name in ("kind", "selection")] if isinstance(experts, dict) else []
    )
    for group in ("model", "experts", *(name for name in METHODS if name in chosen)):
        if not isinstance(values.get(group), dict):
            raise UserError(
                f"{path}: it has no group {group!r}, which a model of model_type {OWN!r} has"
            )
        fields |= {f"{group}.{name}": value for name, value in values[group].items()}
    return fields


def _hub_fields(path, values, architecture: Architecture):
    fields = dict(architecture.constants)
    for name, field in architecture.fields.items():
        value = _value(path, values, architecture, name)
        choices = architecture.choices.get(name)
        if choices is not None and value not in list(choices):
            raise UserError(
                f"{path}: {name}={value!r}: must be one of {', '.join(map(str, choices))}"
            )
        fields[field] = value if choices is None else choices[value]
    for name, known in architecture.only.items():
        if _value(path, {name: known[0]} | values, architecture, name) not in known:
            raise UserError(
                f"{path}: {name}={values[name]!r} isn't implemented; only {known[0]!r} is"
            )
    fields |= _rotary_fields(path, values, architecture)
    _check_attention(path, values, fields)
    return fields


def _value(path, values, architecture, name):
    if name not in values and name not in architecture.defaults:
        raise UserError(
            f"{path}: {name} is missing; a model of model_type {values.get('model_type')!r} has it"
        )
    return values.get(name, architecture.defaults.get(name))


def _check_attention(path, values, fields):
    """Heads of another width and windows that are narrower than the model's length aren't
    implemented.
    """
    width, heads, max_len = (
        fields["model.d_model"],
        fields["model.n_heads"],
        fields["model.max_len"],
    )
    if not all(type(number) is int and number > 0 for number in (width, heads, max_len)):
        return  # `Config` names what is wrong
    if values.get("head_dim") not in (None, width / heads):
        wanted = f"only hidden_size / num_attention_heads = {width / heads:g} is"
        raise UserError(f"{path}: head_dim={values['head_dim']!r} isn't implemented; {wanted}")
    window = values.get("sliding_window")
    if window is not None and not (_is_number(window) and window >= max_len):
        raise UserError(
            f"{path}: sliding_window={window!r} isn't implemented; only one of at least {max_len} is"
        )


def _rotary_fields(path, values, architecture):
    """From either field, `rope_theta` with `rope_scaling`, or `rope_parameters` of transformers 5."""
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if rope and scaling and rope != scaling:
        raise UserError(
            f"{path}: rope_parameters={rope!r} and rope_scaling={scaling!r} differ; leave one"
        )
    rope = rope or scaling
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{path}: rotary positions {rope!r} aren't implemented; only one setting for all layers is"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in architecture.rope_types:
        known = ", ".join(architecture.rope_types)
        raise UserError(
            f"{path}: rope_type={kind!r} isn't implemented for this architecture; known are {known}"
        )
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor isn't implemented; only 1 is")
    bases = [
        base for base in (rope.get("rope_theta"), values.get("rope_theta")) if base is not None
    ]
    if not all(map(_is_number, bases)) or len(set(bases)) > 1:
        raise UserError(
            f"{path}: rope_theta is {' and '.join(map(repr, bases))}; it must be one number"
        )
    fields = {"model.rope_base": bases[0] if bases else architecture.defaults["rope_theta"]}
    if kind == "longrope":
        rope = {
            "original_max_position_embeddings": values.get("original_max_position_embeddings")
        } | rope
        for name in ("short_factor", "short_mscale", "original_max_position_embeddings"):
            if rope.get(name) is None:
                raise UserError(f"{path}: {name} is missing, which rope_type 'longrope' needs")
        factors = rope["short_factor"]
        if not isinstance(factors, list) or not all(map(_is_number, factors)):
            raise UserError(f"{path}: short_factor={factors!r}: must be a list of numbers")
        # Longer texts have frequencies and a scale of their own: a model is read for the length up
        # to which these hold.
        fields |= {
            "model.rope_factors": tuple(map(float, factors)),
            "model.rope_scale": rope["short_mscale"],
            "model.max_len": rope["original_max_position_embeddings"],
        }
    return fields


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_json(config: Config):
    """`config.json` of a model as Mixtral where that says all, else in our own format; without
    dtype and tokens.
    """
    mixtral = _as_mixtral(config)
    try:
        same = computed_fields(from_json(Path(), mixtral)) == computed_fields(config)
    except UserError:
        same = False
    return mixtral if same else as_own(config)


def _as_mixtral(config):
    name = "mixtral"
    values = {"model_type": name, "architectures": [ARCHITECTURES[name].class_name]}
    for theirs, field in ARCHITECTURES[name].fields.items():
        group, _, field = field.partition(".")
        values[theirs] = getattr(getattr(config, group), field)
    values |= {
        their: known[0] for their, known in ARCHITECTURES[name].only.items() if known[0] is not None
    }
    values |= {"num_key_value_heads": config.model.kv_heads, "rope_theta": config.model.rope_base}
    return values | {
        "head_dim": config.model.d_model // config.model.n_heads,
        "sliding_window": None,
    }


def as_own(config: Config):
    """`config.json` in our own format, without dtype and tokens."""
    fields = computed_fields(config)
    groups = {"model": {"max_len": config.model.max_len}, "experts": {}}
    for name, value in fields.items():
        group, _, name = name.partition(".")
        groups.setdefault(group, {})[name] = list(value) if isinstance(value, tuple) else value
    if not config.experts.low_rank:
        groups["experts"]["d_ffn"] = groups["experts"].pop("d_wide")
    return {"model_type": OWN, "architectures": [ARCHITECTURES[OWN].class_name], **groups}
