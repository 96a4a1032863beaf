"""Compares losses at equal training FLOPs, in two core-hours: `--suite=configs/compare/isoflop.py`.

The MoE is trained with 4e12 FLOPs at each of five sizes: the smallest model on the most tokens, 1.8
epochs of the embedded corpus, and the largest model on the fewest tokens, 0.2 epochs. All arms of a
size are trained on the same tokens. AoE uses 1.01x to 1.04x the FLOPs of the MoE, and a dense model
of equal active parameters uses about 1x. At the middle size each arm has its best learning rate
(`rates.py`). At other sizes this rate is scaled by 1 / d_model.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.config.run import Config
from aoe_jax.configs.compare.arms import DENSE_ACTIVE, aoe, at_learning_rate, moe
from aoe_jax.configs.compare.small import base_config, size_of
from aoe_jax.model.counts import training_flops_per_token

FLOPS = 4e12
SHAPES = {
    "d36": (36, 2, 2),
    "d48": (48, 3, 4),
    "d60": (60, 4, 6),
    "d72": (72, 5, 4),
    "d96": (96, 6, 4),
}
BATCH_SIZE = 8


def size_at(flops, *shape):
    """Returns the changes for a size (d_model, layers, heads); its MoE trains for `flops` FLOPs."""
    config = base_config()
    for group, values in size_of(*shape, BATCH_SIZE, 100).items():
        config[group].update(values)
    config.experts.kind = "router"
    config = Config.from_config_dict(config)
    steps = flops / (training_flops_per_token(config) * BATCH_SIZE * config.data.seq_len)
    return size_of(*shape, BATCH_SIZE, 10 * round(steps / 10))


def get_suite():
    base = base_config()
    base.train.rate_width = 60
    return Suite(
        name="isoflop",
        base=base,
        arms={
            "moe_aux": moe("aux"),
            "aoe_d3_aux": at_learning_rate(1e-2, aoe(3, "aux")),
            "dense_active": at_learning_rate(1e-2, replace(DENSE_ACTIVE, label="dense, active")),
        },
        sizes={name: Size(size_at(FLOPS, *shape), seeds=2) for name, shape in SHAPES.items()},
        baseline="moe_aux",
    )
