"""Configurations from flat settings, `{"group.field": value}`."""

from aoe_jax.config.run import Config
from aoe_jax.methods import LAYERS
from aoe_jax.storage.config_files import default_config


def config_of(settings):
    """The `Config` of flat settings; `routing.name` is optional for top-k and for layer methods."""
    config, routing = default_config(), {}
    for name, value in settings.items():
        if name.startswith("routing."):
            routing[name.removeprefix("routing.")] = value
    rest = {name: value for name, value in settings.items() if not name.startswith("routing.")}
    config.update_from_flattened_dict(rest)
    if routing:
        kind = config.experts.kind
        name = routing.pop("name", kind if kind in LAYERS else "top_k")
        config.routing = {"name": name} | routing
    return Config.from_config_dict(config)
