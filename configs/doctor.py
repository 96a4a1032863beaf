"""What `python -m aoe_jax.doctor` examines on accelerators unless `--config` says otherwise: four
layers of the paper's small AoE, whose state and activations fit a chip of 16 GB. Every kernel takes
the widths of its experts, 256, 768 and 3,840, and that of its MoE twin, 3,072.
"""

from aoe_jax.config.run import update_groups
from configs import paper


def get_config():
    config = paper.get_config("aoe_r256_aux")
    changes = {"model": {"n_layers": 4, "remat": "layer"}, "balance": {"aux_tokens": 0.125}}
    update_groups(config, changes)
    return config
