"""Converts configurations that earlier versions of this program stored."""

from aoe_jax.config import VERSION
from aoe_jax.errors import UserError, shown

# Removed field of version 1 -> the only value still implemented; ...: any value is ignored.
_GONE = {
    "model.norm": "rms",
    "model.output_bias": False,
    "model.rope_scale": 1.0,
    "experts.gate_trains_scores": True,
    "routing.balance_weight": 0.0,
    "routing.efficiency_weight": 0.0,
    "routing.measure": "paid",
    "train.repeat_every": ...,
    "checkpoint.local_every": ...,
    "checkpoint.local_path": ...,
}


def upgraded(stored: dict) -> dict:
    """Returns the groups `{group: {field: value}}` of a stored configuration, with the fields of
    this version. Raises `UserError` for later versions, and for settings that were removed.
    """
    groups, version = dict(stored), stored.get("version", 1)
    groups.pop("version", None)
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise UserError(f"{name[:100]} is no group of fields; name a training run's workdir")
        groups[name] = dict(values)
    if type(version) is not int or not 0 < version <= VERSION:
        raise UserError(f"version={shown(version)}: this program reads 1 to {VERSION}; update it")
    if version == VERSION:
        return groups
    for name, only in _GONE.items():
        group, _, field = name.partition(".")
        value = groups.get(group, {}).pop(field, only)
        if only is not ... and value != only:
            raise UserError(f"config.{name}={shown(value)}: only {only!r} is implemented now")
    model = groups.get("model", {})
    if type(model.get("qk_norm")) is bool:
        model["qk_norm"] = "all" if model["qk_norm"] else "none"
    return groups
