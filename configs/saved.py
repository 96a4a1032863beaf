"""A configuration that was saved: `--config=configs/saved.py:FILE`, such as the `config.json` of a
run.
"""

from pathlib import Path

from aoe_jax.config.run import default_config, update_groups
from aoe_jax.errors import UserError
from aoe_jax.training.workdir import read_run_config


def get_config(file=None):
    if not file:
        raise UserError(
            "configs/saved.py: name the file, --config=configs/saved.py:DIR/config.json"
        )
    groups = read_run_config(Path(file).expanduser()).to_dict()
    config = default_config()
    update_groups(config, groups)
    return config
