"""The default configuration of `python -m aoe_jax.doctor` on accelerators is the paper's small AoE
with only four layers. It fits in 16 GB, and no kernel pads its widths, 256, 768 and 3,840.
"""

from aoe_jax.configs import paper
from aoe_jax.storage.config_files import update_groups


def get_config():
    config = paper.get_config("aoe_r256_aux")
    changes = {"model": {"n_layers": 4}, "balance": {"aux_tokens": 0.125}}
    update_groups(config, changes)
    return config
