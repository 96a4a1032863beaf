"""Tunes the learning rates of Muon at 149k active parameters, in two core-hours:
`--suite=configs/compare/leaderboard_rates.py`.

Three families of methods are tuned, each with nine settings and a seed that no other suite uses:
scores that are logits, norms of whole gates, and norms of factorised gates (the published AoE).
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs.compare.arms import aoe, at_learning_rate, moe, varied, whole_aoe
from aoe_jax.configs.compare.small import MIDDLE, base_config

SEED = 1_000_000
FAMILIES = {"logits": moe("aux"), "whole": whole_aoe(16, "aux"), "published": aoe(3, "aux")}
RATES, SCORING_RATES = (1.5e-2, 3e-2, 6e-2), (0.1, 0.3, 1.0)


def tuned(family, rate, scoring_rate):
    train = {"optimizer": "muon", "scoring_rate": scoring_rate}
    arm = varied(at_learning_rate(rate, FAMILIES[family]), train=train)
    label = f"{FAMILIES[family].label}, Muon, rate {rate:g}, scoring rate {scoring_rate:g}"
    return replace(arm, label=label)


def get_suite():
    base = base_config()
    base.train.update(seed=SEED, rate_width=None)
    changes = MIDDLE | {"train": MIDDLE["train"] | {"eval_every": 0}, "checkpoint": {"every": 740}}
    return Suite(
        name="leaderboard_rates",
        base=base,
        arms={
            f"{family}_{rate:g}_{scoring_rate:g}": tuned(family, rate, scoring_rate)
            for family in FAMILIES
            for rate in RATES
            for scoring_rate in SCORING_RATES
        },
        sizes={"149k": Size(changes, seeds=1)},
        baseline="logits_0.015_1",
    )
