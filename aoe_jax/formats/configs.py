"""Converts the `config.json` of a model to a `Config`, and back."""

import contextlib
import dataclasses
import logging
import math

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from aoe_jax.config.checks import differences
from aoe_jax.config.run import Config
from aoe_jax.config.versions import upgraded
from aoe_jax.errors import UserError, shown
from aoe_jax.formats.architectures import ARCHITECTURES, OWN
from aoe_jax.methods import is_in_file
from aoe_jax.storage.files import COUNT, NUMBER

log = logging.getLogger(__name__)

WINDOW = 1024  # default data.seq_len of a model, unless its model.max_len is shorter
_AUTO_MAP = {
    "AutoConfig": "configuration_aoe.AoEConfig",
    "AutoModel": "modeling_aoe.AoEModel",
    "AutoModelForCausalLM": "modeling_aoe.AoEForCausalLM",
}
_OWN_GROUPS = ("model", "experts", "routing")  # in the config.json that `as_own` returns
# Routing methods that are usually trained with the balance loss L_aux.
_BALANCED = ("top_k", "top_p", "sparsemixer", "erc", "capacity")


def computed_fields(config: Config):
    """Returns `{field: value}` of the settings that, with the parameters, determine the outputs."""
    model, experts, routing, groups = config.model, config.experts, config.routing, config.to_dict()
    fields = flatten_dict({name: groups[name] for name in ("model", "experts", "routing")}, sep=".")
    fields |= {"model.n_kv_heads": model.kv_heads, "model.head_dim": model.head_width}
    fields["experts.d_wide"] = experts.width(model.d_model)
    # These do not affect the outputs; d_ffn and round_to only determine d_wide, which is included.
    unused = {"model.dtype", "model.remat", "model.unroll", "model.attention", "model.max_len"}
    unused |= {"experts.score_gradient", "experts.gradient_sums", "experts.grouped_matmul"}
    unused |= {"experts.d_ffn", "experts.round_to"}
    settings = dataclasses.fields(routing)
    unused |= {f"routing.{f.name}" for f in settings if f.metadata.get("training_only")}
    if not experts.low_rank and not experts.large_router:
        unused.add("experts.d_low")
    if not routing.choice(experts):
        unused.add("experts.top_k")
    if experts.kind == "dense":
        unused.add("experts.n_experts")
    return {name: value for name, value in fields.items() if name not in unused}


def refuse_code(routing):
    """Raises `UserError` if a model's group `routing` names a Python file, which would be run."""
    name = routing.get("name") if isinstance(routing, dict) else None  # others are refused later
    if is_in_file(name):
        raise UserError(f"routing.name={shown(name)} is a Python file; a model cannot name one")


def from_json(values: dict):
    """Returns the `Config` of a model from the content of its `config.json`.

    `model.dtype` is float32. `data.seq_len` is `WINDOW`, or `model.max_len` if that is shorter or
    if `WINDOW` is too short for the routing method. `balance.aux_weight` is 0 if the method is
    usually trained without L_aux. Other fields have their defaults. Raises `UserError` if the
    architecture is unknown, if a field is missing or invalid, or if a feature is not implemented.
    """
    name, known = values.get("model_type"), f"known are {', '.join(ARCHITECTURES)}"
    if name is None:
        take = "`python -m aoe_jax.export` exports the model of a training run"
        raise UserError(f"it has no model_type; {take}")
    _check(isinstance(name, str), "model_type", name, f"is no text; {known}")
    _check(name in ARCHITECTURES, "model_type", name, f"is unknown; {known}")
    groups = Config().to_dict() | {"routing": {}}
    has_groups = name == OWN and "hidden_size" not in values
    if has_groups:
        own = upgraded({name: values[name] for name in _OWN_GROUPS if name in values})
        for group in _OWN_GROUPS:
            if group not in own:
                raise UserError(f"it has no group {group!r}, which a model of type 'aoe' has")
            groups[group] |= own[group]
    else:
        for group, own in unflatten_dict(_hub_fields(values), sep=".").items():
            groups[group] |= own
    refuse_code(groups["routing"])
    groups["model"]["dtype"] = "float32"
    groups["data"]["seq_len"] = groups["model"]["max_len"]
    if groups["routing"].get("name", "top_k") not in _BALANCED:
        groups["balance"]["aux_weight"] = 0.0
    config = Config.from_config_dict(groups)
    if not has_groups:
        _check_attention(values, config.model)
        factors = _rope_factors(values, config.model)
        model = dataclasses.replace(config.model, rope_factors=factors)
        config = dataclasses.replace(config, model=model)
    with contextlib.suppress(UserError):  # the routing method may need longer sequences
        window = dataclasses.replace(config.data, seq_len=min(WINDOW, config.model.max_len))
        return dataclasses.replace(config, data=window)
    return config


def _check(is_right, field, value, problem):
    if not is_right:
        raise UserError(f"{field}={shown(value)} {problem}")


def _check_implemented(is_right, field, value, only):
    _check(is_right, field, value, f"is not implemented; only {only}")


def _hub_fields(values):
    name = values["model_type"]
    architecture = ARCHITECTURES[name]
    for field, known in architecture.only.items():
        value, names = values.get(field, known[0]), " or ".join(map(repr, known))
        _check_implemented(value in known, field, value, f"{names} is")
    also = {name: values[other] for other, name in architecture.aliases if other in values}
    fields, given = dict(architecture.constants), values | also
    for field, (sets, *default) in architecture.fields.items():
        if field not in given and not default:
            raise UserError(f"{field} is missing; a model of model_type {shown(name)} has it")
        fields[sets] = given.get(field, *default)
    if name == OWN and fields["experts.score_neurons"] is None:
        fields["experts.d_wide"] = fields.pop("experts.d_ffn")
    if "first_k_dense_replace" in architecture.fields:  # num_hidden_layers counts all layers
        n_layers, n_dense = fields["model.n_layers"], fields["model.n_dense_layers"]
        is_right = COUNT.holds(n_layers) and COUNT.holds(n_dense) and n_dense < n_layers
        wanted = f"must be a whole number below num_hidden_layers={shown(n_layers)}"
        _check(is_right, "first_k_dense_replace", n_dense, wanted)
        fields["model.n_layers"] = n_layers - n_dense
        fields["model.d_dense"] = fields["model.d_dense"] if n_dense else None
    if "n_shared_experts" in architecture.fields:
        n_shared, width = fields["experts.d_shared"], fields["experts.d_ffn"]
        is_right = COUNT.holds(n_shared) and n_shared > 0
        _check(is_right, "n_shared_experts", n_shared, "must be a number from 1")
        _check(COUNT.holds(width), "moe_intermediate_size", width, "must be a number")
        fields["experts.d_shared"] = n_shared * width
    if type(fields.get("model.qk_norm")) is bool:
        fields["model.qk_norm"] = "head" if fields["model.qk_norm"] else "none"
    rope, kinds = _rotary_settings(values), architecture.rope_types
    kind = rope["rope_type"]
    _check_implemented(kind in kinds, "rope_type", kind, f"{', '.join(kinds)} are for this model")
    share = rope.get("partial_rotary_factor", architecture.rope_share)
    is_known = "partial_rotary_factor" in architecture.fields or share == 1
    _check_implemented(is_known, "partial_rotary_factor", share, "1 is")
    theta = rope.get("rope_theta", architecture.rope_theta)
    return fields | {"model.rope_base": theta, "model.rope_share": share}


def _check_attention(values, model):
    width, head_dim = model.d_model / model.n_heads, model.head_width
    only = f"hidden_size / num_attention_heads = {width:g} is with a norm over all heads"
    _check_implemented(model.qk_norm != "all" or head_dim == width, "head_dim", head_dim, only)
    types, n_layers = values.get("layer_types"), model.n_dense_layers + model.n_layers
    is_full = types is None
    if isinstance(types, list):
        is_full = len(types) == n_layers == types.count("full_attention")
    _check_implemented(is_full, "layer_types", types, "'full_attention' in every layer is")
    if "use_sliding_window" not in ARCHITECTURES[values["model_type"]].only:
        window = values.get("sliding_window")
        is_longer = window is None or (isinstance(window, int) and window >= model.max_len)
        only = f"one of at least {model.max_len} is"
        _check_implemented(is_longer, "sliding_window", window, only)


def _rotary_settings(values):
    """Returns the rotary settings by name, with `rope_type`. They are in `rope_parameters`
    (transformers 5), in `rope_scaling`, or at the top level (for example `rope_theta`).
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    is_one = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    _check_implemented(is_one, "rope_parameters", rope, "one setting for all layers is")
    given = {name: value for name, value in (values | rope).items() if value is not None}
    return {"rope_type": given.get("type", "default")} | given


def _rope_factors(values, model):
    """Returns the divisors of the rotary frequencies: Llama 3.1's, or those that `to_json` wrote.

    Llama 3.1 divides a frequency by `factor` if it makes fewer than `low_freq_factor` turns within
    the pretraining length, and by 1 if it makes more than `high_freq_factor` turns. Between these
    limits, the reciprocal of the divisor is linear in the number of turns.
    """
    rope = _rotary_settings(values)
    if rope["rope_type"] == "longrope":
        factors, long, scale = map(rope.get, ("short_factor", "long_factor", "attention_factor"))
        are_numbers = isinstance(factors, list) and all(map(NUMBER.holds, factors))
        _check(are_numbers, "short_factor", factors, "must be a list of numbers")
        _check_implemented(long == factors, "long_factor", long, "the values of short_factor are")
        _check_implemented(scale == 1, "attention_factor", scale, "1 is")
        return tuple(map(float, factors))
    if rope["rope_type"] != "llama3":
        return model.rope_factors
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    found = [rope.get(name) for name in names]
    for name, value in zip(names, found, strict=True):
        is_right = value is not None and NUMBER.holds(value) and 0 < value < math.inf
        _check(is_right, name, value, "must be a number greater than 0 with rope_type 'llama3'")
    factor, low, high, length = found
    _check(low < high, "low_freq_factor", low, f"must be below high_freq_factor={high}")
    half = model.head_width // 2
    turns = length / (2 * np.pi) * model.rope_base ** (-np.arange(half) / half)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def to_json(config: Config, routing_state=()):
    """Returns the `config.json` of a model with `routing_state`, except dtype and special tokens.

    The architecture is the first in `ARCHITECTURES` that can express the whole model. If none can,
    the result is that of `as_own`: only `aoe_jax` can load the model, and the log says why. Raises
    `UserError` if the router is in a Python file.
    """
    refuse_code({"name": config.routing.name})
    has_bias = "selection_bias" in routing_state
    wanted = computed_fields(config) | {"selection_bias": has_bias}
    lacking = []  # (class of transformers, fields that it lacks)
    for name, architecture in ARCHITECTURES.items():
        values = _hub_json(config, name)
        takes_bias = "layers/selection_bias" in architecture.tensors
        if name == OWN:
            values |= {"auto_map": _AUTO_MAP, "selection_bias": has_bias}
            takes_bias = has_bias
        with contextlib.suppress(UserError):
            found = computed_fields(from_json(values)) | {"selection_bias": takes_bias}
            fields = differences(found, wanted)
            if not fields:
                return values
            lacking.append((architecture.class_name, fields))
    missing = ("its nearest class", wanted)
    nearest, fields = min(lacking, key=lambda pair: len(pair[1]), default=missing)
    named = ", ".join(f"{name}={wanted[name]!r}" for name in fields if name in wanted)
    log.info("transformers cannot load the model: %s lacks %s", nearest, named)
    return as_own(config)


def _hub_json(config, model_type):
    """Returns the `config.json` of an architecture; it omits fields that `config` does not have."""
    architecture = ARCHITECTURES[model_type]
    fields = {"model_type": model_type, "architectures": [architecture.class_name]}
    computed = computed_fields(config)
    for theirs, (sets, *_) in architecture.fields.items():
        group, _, ours = sets.partition(".")
        if sets == "experts.d_ffn":
            fields[theirs] = computed["experts.d_wide"]
        elif hasattr(getattr(config, group), ours):
            fields[theirs] = computed.get(sets, getattr(getattr(config, group), ours))
    model, experts = config.model, config.experts
    if "first_k_dense_replace" in fields:
        fields["num_hidden_layers"] = model.n_dense_layers + model.n_layers
    if "n_shared_experts" in fields:  # the variants of DeepSeek-V3
        fields["intermediate_size"] = model.d_dense or experts.d_ffn
        fields["n_shared_experts"] = experts.d_shared // experts.d_ffn
    if "use_qk_norm" in fields:
        fields["use_qk_norm"] = model.qk_norm == "head"
    fields |= {"hidden_act": "silu", "rope_theta": model.rope_base, "sliding_window": None}
    if model.rope_factors:
        # Transformers 4 reads only `rope_scaling`. Our own format does not use this field, because
        # with it `AutoTokenizer` fails if our classes are not loaded.
        fields["rope_parameters" if model_type == OWN else "rope_scaling"] = {
            "rope_type": "longrope",  # every architecture supports it
            "short_factor": list(model.rope_factors),
            "long_factor": list(model.rope_factors),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": model.max_len,
        }
    return fields


def as_own(config: Config):
    """Returns the `config.json` of our own format in groups, without dtype and special tokens."""
    groups = {"model": {"max_len": config.model.max_len}, "experts": {}, "routing": {}}
    for name, value in computed_fields(config).items():
        group, _, name = name.partition(".")
        groups[group][name] = value
    if not config.experts.low_rank:
        groups["experts"]["d_ffn"] = groups["experts"].pop("d_wide")
    return {"model_type": OWN, "architectures": [ARCHITECTURES[OWN].class_name], **groups}
