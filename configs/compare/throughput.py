"""Measures the time of a training step for several n_experts, top_k, ranks and batch sizes:
`--suite=configs/compare/throughput.py`.

The suite compares AoE with the dropless MoE of equal total parameters and with two dense models:
one of equal total and one of equal active parameters. All models have two layers of width 192 and
random weights. The suite takes about an hour on two CPU cores.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Suite, Sweep
from aoe_jax.configs import tiny
from aoe_jax.configs.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe

MODEL = {
    "model": {"n_layers": 2, "unroll": 2, "n_heads": 4, "d_model": 192, "vocab_size": 1024},
    "experts": {"n_experts": 8, "top_k": 2, "d_ffn": 384},
}


def get_suite():
    return Suite(
        name="throughput",
        base=tiny.get_config("published"),
        arms={
            "moe_aux": moe("aux"),
            "aoe_aux": replace(aoe(3, "aux"), label="AoE, L_aux of 1/8"),
            "aoe_free": replace(aoe(3, "free"), label="AoE, loss-free"),
            "dense": DENSE,
            "dense_active": replace(DENSE_ACTIVE, label="dense, active"),
        },
        sizes={},
        baseline="moe_aux",
        throughput={
            "experts": Sweep("experts.n_experts", (4, 8, 16, 32, 64), MODEL),
            "chosen": Sweep("experts.top_k", (1, 2, 4, 8), MODEL),
            "rank": Sweep("experts.d_low", (12, 24, 48, 96), MODEL),
            "tokens": Sweep("train.batch_size", (1, 2, 4, 8, 16), MODEL),
        },
    )
