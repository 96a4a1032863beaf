"""Loss over sizes at equal training FLOPs, two core-hours: `--suite=configs/compare/isoflop.py`.

The MoE spends 4e12 FLOPs at each of five sizes: few parameters and many tokens, or the reverse.
That is 1.8 to 0.2 epochs of the embedded corpus. All arms of a size see the same tokens: AoE spends
1.01x to 1.04x the MoE's FLOPs, and a dense model of equal active parameters spends the same as the
MoE. A dense model of equal total parameters would have other FLOPs. At the middle size each arm has
its best learning rate (`rates.py`); at other sizes the rate is in inverse proportion to d_model.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.config.run import Config
from aoe_jax.model.counts import training_flops_per_token
from configs.compare.arms import DENSE_ACTIVE, aoe, at_learning_rate, moe
from configs.compare.small import base_config, size_of

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
    """Returns the changes of a size (d_model, layers, heads) with that many FLOPs for the MoE."""
    config = base_config()
    for group, values in size_of(*shape, BATCH_SIZE, 100).items():
        config[group].update(values)
    config.experts.kind = "router"
    config = Config.from_config_dict(config)
    steps = flops / (training_flops_per_token(config) * BATCH_SIZE * config.data.seq_len)
    return size_of(*shape, BATCH_SIZE, 10 * round(steps / 10))


def get_suite():
    return Suite(
        name="isoflop",
        base=base_config(),
        arms={
            "moe_aux": moe("aux"),
            "aoe_d3_aux": at_learning_rate(1e-2, aoe(3, "aux")),
            "dense_active": at_learning_rate(1e-2, replace(DENSE_ACTIVE, label="dense, active")),
        },
        sizes={
            name: Size(size_at(FLOPS, *shape), seeds=2, rate_factor=60 / shape[0])
            for name, shape in SHAPES.items()
        },
        baseline="moe_aux",
    )
