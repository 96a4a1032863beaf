"""Compares methods of expert selection at the smallest size of `small.py`:
`--suite=configs/compare/methods.py`.

Arms are the variants of `configs/methods.py`. Each arm with AoE is compared to AoE with top-k, and
each arm with a router to the router with top-k. The router with top-k is compared to AoE with
top-k. All arms use the learning rate of `small.py`, which is best for AoE and for the router with
top-k; to tune each arm would take longer than all runs. switch, smear and thor use only one expert
per token, so switch and smear have about half the expert FLOPs of the other arms. thor processes
every batch twice: it has the expert FLOPs of most arms, and twice the attention FLOPs.
"""

from aoe_jax.compare.suite import Arm, Size, Suite, Sweep
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.configs import methods
from aoe_jax.configs.compare.small import SMALLEST, base_config
from aoe_jax.methods import find_method


def _arm(variant):
    name = variant.removesuffix("_router")

    def changes(config):
        found = methods.changes(variant)
        found["experts"] = {"d_low": config.model.d_model // 3} | found["experts"]
        return found

    experts, settings, _ = methods.VARIANTS[variant]
    method = find_method(settings["name"])()
    causality = method.causality(ExpertsConfig())
    notes = {
        "one expert a token": experts.get("top_k") == 1 or method.choice(ExpertsConfig()) is None,
        "two passes": method.hooks.passes == 2,
        "not causal": causality.reason and causality.until_step is None,
    }
    of = "AoE, " if variant == name else "router, "
    label = "UoE-style" if method.name == "uoe" else of + name.replace("_", " ")
    if any(notes.values()):
        label += f" ({', '.join(note for note, holds in notes.items() if holds)})"
    return Arm(
        label, changes, reference="top_k_router" if variant not in (name, "top_k_router") else None
    )


def get_suite():
    return Suite(
        name="methods",
        base=base_config(),
        # Whole gates are compared in `screen.py` and `confirm.py`.
        arms={v: _arm(v) for v in methods.VARIANTS if v != "whole_gate"},
        sizes={"42k": Size(SMALLEST, seeds=3)},
        baseline="top_k",
        # Step times of top-k with other K show the cost of other numbers of experts per token.
        throughput={
            "chosen": Sweep(
                "experts.top_k", (1, 2, 3, 4, 5, 6), SMALLEST, ("top_k", "top_k_router")
            )
        },
    )
