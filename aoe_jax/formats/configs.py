"""`config.json` of a model to `aoe_jax.config.Config`, and back."""

import dataclasses
from pathlib import Path

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.formats.architectures import ARCHITECTURES, REQUIRED, Architecture

OWN = "aoe"  # the model_type of our own format
WINDOW = 1024  # tokens of a window in scoring and training, where the model takes as many
# Fields that decide how a model is computed, but not its results.
_EXECUTION = (
    "model.dtype",
    "model.remat",
    "model.unroll",
    "model.max_len",
    "experts.score_gradient",
)
# Routers beside which L_aux is the usual loss.
_BALANCED = ("top_k", "top_p", "ranked", "sparsemixer", "erc", "capacity")


def computed_fields(config: Config):
    """The fields that decide which function of its parameters a model computes.

    Returns:
      `{field: value}`; two models that compute the same function have equal fields.
    """
    model, experts, routing = config.model, config.experts, config.routing
    fields = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    fields |= {f"experts.{name}": value for name, value in dataclasses.asdict(experts).items()}
    fields["routing.name"] = routing.name
    for field in dataclasses.fields(routing):
        if not field.metadata.get("training_only"):
            fields[f"routing.{field.name}"] = getattr(routing, field.name)
    fields |= {"model.n_kv_heads": model.kv_heads, "experts.d_wide": experts.width(model.d_model)}
    unused = {*_EXECUTION, "experts.d_ffn", "experts.round_to"}  # d_wide follows from them
    if not experts.low_rank and not experts.large_router:
        unused.add("experts.d_low")
    if not routing.choice(experts):
        unused.add("experts.top_k")
    if experts.kind == "dense":
        unused.add("experts.n_experts")
    return {name: value for name, value in fields.items() if name not in unused}


def is_choice(name):
    """Whether a field decides how experts are chosen and weighted, not which parameters exist."""
    return name == "experts.top_k" or name.startswith("routing.")


def from_json(path: Path, values: dict):
    """The configuration of a model.

    `model.dtype` is float32, `data.seq_len` is `WINDOW` or what the model can take, and other
    groups have their defaults.

    Args:
      path: of the `config.json`, for errors.
      values: its content.

    Raises:
      UserError: the architecture is unknown, a field is missing or has an invalid value, or
        something isn't implemented here.
    """
    architecture = _architecture(path, values)
    own = values["model_type"] == OWN
    fields = _own_fields(path, values) if own else _hub_fields(path, values, architecture)
    groups = Config().to_dict() | {"routing": {}}
    for name, value in fields.items():
        group, _, name = name.partition(".")
        groups[group][name] = value
    groups["model"]["dtype"] = "float32"
    if groups["routing"].get("name", "top_k") not in _BALANCED:
        groups["balance"]["aux_weight"] = 0.0
    if isinstance(groups["model"]["max_len"], int):
        groups["data"]["seq_len"] = groups["model"]["max_len"]
    try:
        config = Config.from_config_dict(groups)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    window = dataclasses.replace(config.data, seq_len=min(WINDOW, config.model.max_len))
    try:
        return dataclasses.replace(config, data=window)
    except UserError:  # a method that needs longer sequences
        return config


def _architecture(path, values):
    name = values.get("model_type")
    if name is None:
        wanted = "`python -m aoe_jax.export` takes the model out of a training run"
        raise UserError(f"{path} has no model_type; {wanted}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path}: model_type={name!r} is unknown; known are {known}")
    return ARCHITECTURES[name]


def _own_fields(path, values):
    fields = {}
    for group in ("model", "experts", "routing"):
        if not isinstance(values.get(group), dict):
            raise UserError(
                f"{path}: it has no group {group!r}, which a model of model_type {OWN!r} has"
            )
        fields |= {f"{group}.{name}": value for name, value in values[group].items()}
    return fields


def _hub_fields(path, values, architecture: Architecture):
    fields = dict(architecture.constants)
    for name, field in architecture.fields.items():
        if name not in values and field.default is REQUIRED:
            wanted = f"a model of model_type {values['model_type']!r} has it"
            raise UserError(f"{path}: {name} is missing; {wanted}")
        value = values.get(name, field.default)
        if field.only and value not in field.only:
            raise UserError(
                f"{path}: {name}={value!r} isn't implemented; only {field.only[0]!r} is"
            )
        if field.sets:
            fields[field.sets] = value
    fields |= _rotary_fields(path, values, architecture)
    _check_attention(path, values, fields)
    return fields


def _check_attention(path, values, fields):
    """Refuses head widths other than d_model / n_heads, and windows shorter than the model."""
    names = ("model.d_model", "model.n_heads", "model.max_len")
    width, heads, max_len = (fields[name] for name in names)
    if not all(type(number) is int and number > 0 for number in (width, heads, max_len)):
        return  # `Config` names what is wrong
    if values.get("head_dim") not in (None, width / heads):
        wanted = f"only hidden_size / num_attention_heads = {width / heads:g} is"
        raise UserError(f"{path}: head_dim={values['head_dim']!r} isn't implemented; {wanted}")
    window = values.get("sliding_window")
    if window is not None and not (_is_number(window) and window >= max_len):
        wanted = f"only one of at least {max_len} is"
        raise UserError(f"{path}: sliding_window={window!r} isn't implemented; {wanted}")


def _rotary_fields(path, values, architecture):
    """Reads `rope_theta` with `rope_scaling`, or `rope_parameters` as transformers 5 writes it."""
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if rope and scaling and rope != scaling:
        raise UserError(
            f"{path}: rope_parameters={rope!r} and rope_scaling={scaling!r} differ; leave one"
        )
    rope = rope or scaling
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        wanted = "only one setting for all layers is"
        raise UserError(f"{path}: rotary positions {rope!r} aren't implemented; {wanted}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in architecture.rope_types:
        wanted = f"known are {', '.join(architecture.rope_types)}"
        raise UserError(
            f"{path}: rope_type={kind!r} isn't implemented for this architecture; {wanted}"
        )
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor isn't implemented; only 1 is")
    bases = [
        base for base in (rope.get("rope_theta"), values.get("rope_theta")) if base is not None
    ]
    if not all(map(_is_number, bases)) or len(set(bases)) > 1:
        found = " and ".join(map(repr, bases))
        raise UserError(f"{path}: rope_theta is {found}; it must be one number")
    fields = {"model.rope_base": bases[0] if bases else architecture.rope_theta}
    return fields | (_longrope_fields(path, values, rope) if kind == "longrope" else {})


def _longrope_fields(path, values, rope):
    """The short factors of longrope.

    Longer texts have other frequencies and another scale, so the model is read for the length up to
    which the short ones hold.
    """
    length = "original_max_position_embeddings"
    rope = {length: values.get(length)} | rope
    for name in ("short_factor", "short_mscale", length):
        if rope.get(name) is None:
            raise UserError(f"{path}: {name} is missing, which rope_type 'longrope' needs")
    factors = rope["short_factor"]
    if not isinstance(factors, list) or not all(map(_is_number, factors)):
        raise UserError(f"{path}: short_factor={factors!r}: must be a list of numbers")
    return {
        "model.rope_factors": tuple(map(float, factors)),
        "model.rope_scale": rope["short_mscale"],
        "model.max_len": rope[length],
    }


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_json(config: Config):
    """`config.json` of a model, without its dtype and its special tokens.

    It is a Mixtral where Mixtral can express the whole model, else our own format.
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
        if field.sets:
            group, _, ours = field.sets.partition(".")
            values[theirs] = getattr(getattr(config, group), ours)
        elif field.default is not None:
            values[theirs] = field.default
    return values | {
        "num_key_value_heads": config.model.kv_heads,
        "rope_theta": config.model.rope_base,
        "head_dim": config.model.d_model // config.model.n_heads,
        "sliding_window": None,
    }


def as_own(config: Config):
    """`config.json` in our own format, without the dtype and the special tokens."""
    groups = {"model": {"max_len": config.model.max_len}, "experts": {}, "routing": {}}
    for name, value in computed_fields(config).items():
        group, _, name = name.partition(".")
        groups.setdefault(group, {})[name] = list(value) if isinstance(value, tuple) else value
    if not config.experts.low_rank:
        groups["experts"]["d_ffn"] = groups["experts"].pop("d_wide")
    return {"model_type": OWN, "architectures": [ARCHITECTURES[OWN].class_name], **groups}
