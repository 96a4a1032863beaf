"""Compares the three main arms of `confirm.py` with other batch sizes and numbers of experts:
`--suite=configs/compare/other.py`.

The suite takes four core-hours. It changes the middle size of `small.py` in four ways, at its own
learning rate: batches that are four times as large, 2 of 16 experts, 8 of 64 experts, and 8 of 256
experts. Experts of the last two models have a quarter of the width. AoE has no router, so it has
1.2% fewer parameters than the MoE with 64 experts, and 1.4% fewer with 256. The report in
`results/other` also has runs on a second corpus, `manuals`.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs.compare.confirm import ARMS, AT_ALL_SIZES
from aoe_jax.configs.compare.small import MIDDLE, base_config


def _changed(**groups):
    return MIDDLE | {name: MIDDLE.get(name, {}) | fields for name, fields in groups.items()}


LARGE_BATCH = {
    "train": {"batch_size": 32, "steps": 370, "warmup": 18 / 370, "eval_every": 74},
    "checkpoint": {"every": 37, "keep": 1, "keep_every": 37},
}


def _experts(n_experts, top_k, d_ffn):
    return _changed(experts={"n_experts": n_experts, "top_k": top_k, "d_ffn": d_ffn})


def get_suite():
    return Suite(
        name="other",
        base=base_config(),
        arms={name: replace(ARMS[name], matched=name == "moe") for name in AT_ALL_SIZES},
        sizes={
            "large_batch": Size(_changed(**LARGE_BATCH), seeds=3),
            "16_experts": Size(_experts(16, 2, 96), seeds=3),
            "64_experts": Size(_experts(64, 8, 24), seeds=3),
            "256_experts": Size(_experts(256, 8, 24), seeds=3),
        },
        baseline="moe",
    )
