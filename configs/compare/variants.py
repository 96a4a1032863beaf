"""Compares variants of MoE and AoE at the middle size of `small.py`, in about four core-hours:
`--suite=configs/compare/variants.py`.

The arms are the dropless MoE and AoE, MoEs that drop tokens as Switch and GShard do, ablations of
the paper's Table 2, MoE and AoE with weights from the softmax over all experts, and the routing
methods of the paper's Table 3. AoE with top-p or with weights over all experts is compared to the
MoE with the same change. All arms have the learning rate of MoE and AoE in `small.py` at this size.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs.compare.arms import (
    aoe,
    capacity,
    low_rank_moe,
    moe,
    other_router,
    weights_over_all,
)
from aoe_jax.configs.compare.small import MIDDLE, base_config


def get_suite():
    return Suite(
        name="variants",
        base=base_config(),
        arms={
            "moe_aux": moe("aux"),
            "aoe_d3_aux": aoe(3, "aux"),
            "capacity_1": capacity(1.0),
            "capacity_1.25": capacity(1.25),
            "capacity_2": capacity(2.0),
            "moe_factorised": low_rank_moe(3, "factorised_gate"),
            "moe_large_router": low_rank_moe(3, "large_router"),
            "moe_gate_all": weights_over_all(moe("aux")),
            "aoe_d3_gate_all": replace(weights_over_all(aoe(3, "aux")), reference="moe_gate_all"),
            "moe_top_p": other_router(moe("none"), "top_p"),
            "aoe_d3_top_p": replace(other_router(aoe(3, "none"), "top_p"), reference="moe_top_p"),
            "moe_expert_choice": other_router(moe("none"), "expert_choice"),
            "aoe_d3_expert_choice": other_router(aoe(3, "none"), "expert_choice"),
        },
        sizes={"149k": Size(MIDDLE, seeds=3)},
        baseline="moe_aux",
    )
