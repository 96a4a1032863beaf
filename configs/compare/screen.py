"""Compares many variants of AoE at the middle size of `small.py`, in five core-hours:
`--suite=configs/compare/screen.py`.

The name of an arm says from which activations scores are computed: from low-rank activations, as in
the paper (`d3`), or from the first pre-activations of whole gates (`whole16`: the first 16). All
arms have L_aux, and the learning rate of MoE and AoE in `small.py` at this size. The MoE and both
forms of AoE are also trained with other values of `train.scoring_rate` and a longer warm-up.

The report in `results/screen` has four more arms: scores that are norms of rectified activations
(`relu_norm`), norms with a learned scale and shift or a learned offset per expert (`scaled_norm`,
`offset_norm`), and gates that give no gradient to the neurons that compute scores. None of the four
lowered the loss, so their code was removed; commit f86e4c6 has it.
"""

from aoe_jax.compare.suite import Arm, Size, Suite
from aoe_jax.configs.compare.arms import aoe, low_rank_moe, moe, varied, whole_aoe
from aoe_jax.configs.compare.small import MIDDLE, base_config

RATES = (0.1, 0.3, 3.0)


def with_rates(name, arm):
    """Returns `{name: arm}`: copies of an arm, one with each scoring rate of `RATES`."""
    return {f"{name}_rate{rate:g}": varied(arm, train={"scoring_rate": rate}) for rate in RATES}


def routing_neurons(count):
    """Returns an arm in the style of Union-of-Experts with `count` routing neurons per expert."""
    routing = {"name": "uoe", "routing_neurons": count}
    changes = {"experts": {"kind": "uoe"}, "routing": routing}
    return Arm(f"AoE of routing neurons (UoE-style), {count}", changes)


def get_suite():
    published, whole, router = aoe(3, "aux"), whole_aoe(16, "aux"), moe("aux")
    return Suite(
        name="screen",
        base=base_config(),
        arms={
            "moe": router,
            "aoe_d3": published,
            "aoe_whole16": whole,
            "aoe_whole4_max": whole_aoe(4, "aux", "max"),
            "moe_factorised": low_rank_moe(3, "factorised_gate"),
            "aoe_whole1": whole_aoe(1, "aux"),
            "aoe_whole4": whole_aoe(4, "aux"),
            "aoe_whole8": whole_aoe(8, "aux"),
            "aoe_whole96": whole_aoe(96, "aux"),
            "aoe_whole1_max": whole_aoe(1, "aux", "max"),
            "aoe_whole16_max": whole_aoe(16, "aux", "max"),
            "aoe_d3_max": varied(published, experts={"score": "max"}),
            **with_rates("moe", router),
            **with_rates("aoe_d3", published),
            **with_rates("aoe_whole16", whole),
            **with_rates("aoe_whole16_max", whole_aoe(16, "aux", "max")),
            **with_rates("aoe_whole1_max", whole_aoe(1, "aux", "max")),
            "aoe_uoe4": routing_neurons(4),
            "aoe_uoe16": routing_neurons(16),
        },
        sizes={
            "149k": Size(MIDDLE, seeds=3),
            "149k_warmup": Size(
                MIDDLE | {"train": MIDDLE["train"] | {"warmup": 0.2}},
                seeds=3,
                arms=("moe", "aoe_d3", "aoe_whole16"),
            ),
        },
        baseline="moe",
    )
