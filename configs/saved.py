"""A configuration that was saved: `--config=configs/saved.py:FILE`, such as the `config.json` of a
run.
"""

import dataclasses
from pathlib import Path

from aoe_jax.config import Config, default_config
from aoe_jax.errors import UserError
from aoe_jax.training.workdir import read_config_json


def get_config(file=None):
    if not file:
        raise UserError(
            "configs/saved.py: name the file, --config=configs/saved.py:DIR/config.json"
        )
    groups = dataclasses.asdict(Config.from_config_dict(read_config_json(Path(file).expanduser())))
    config = default_config()
    for group, values in groups.items():
        config[group].update(values)
    return config
