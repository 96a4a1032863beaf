"""Tunes the learning rates of Muon at 149k active parameters, in three core-hours:
`--suite=configs/compare/leaderboard_rates.py`.

Three families of methods are tuned, each with six settings and two seeds that no other suite uses:
scores that are logits, norms of whole gates, and norms of factorised gates (the published AoE).
"""

from aoe_jax.compare.suite import Size, Suite
from configs.compare.arms import aoe, at_learning_rate, moe, varied, whole_aoe
from configs.compare.small import MIDDLE, base_config

SEED = 1_000_000
FAMILIES = {"logits": moe("aux"), "whole": whole_aoe(16, "aux"), "published": aoe(3, "aux")}
RATES, SCORING_RATES = (7.5e-3, 1.5e-2, 3e-2), (0.3, 1.0)


def tuned(family, rate, scoring_rate):
    train = {"optimizer": "muon", "scoring_rate": scoring_rate}
    return varied(at_learning_rate(rate, FAMILIES[family]), train=train)


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
        sizes={"149k": Size(changes, seeds=2)},
        baseline="logits_0.015_1",
    )
