"""Tries four learning rates for each arm of `small.py`, `confirm.py` and `isoflop.py`, in an hour:
`--suite=configs/compare/rates.py`.

Runs are short: 420 steps at the smallest size, and 400 steps at the middle size of `isoflop.py`.
Their seed is not used in the other suites. The rates of the other suites are from an earlier search
over the same rates, at the commit that `results/README.md` names. All arms of `confirm.py` have
0.02. In `small.py`, `moe_free` and `dense` have 0.04, and the other arms 0.02. In `isoflop.py`, the
MoE has 0.02, and the other arms 0.01.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs.compare import confirm, small
from aoe_jax.configs.compare.arms import DENSE_ACTIVE, at_learning_rate

RATES = (5e-3, 1e-2, 2e-2, 4e-2)
SEED = 1_000_000
D60 = ("moe_aux", "aoe_d3_aux", "dense_active")


def get_suite():
    base = small.base_config()
    base.train.seed = SEED
    arms = small.ARMS | {f"confirm_{name}": arm for name, arm in confirm.ARMS.items()}
    arms["dense_active"] = DENSE_ACTIVE
    grid = {}
    for name, arm in arms.items():
        for rate in RATES:
            label = f"{arm.label}, rate {rate:g}"
            grid[f"{name}_{rate:g}"] = replace(at_learning_rate(rate, arm), label=label)
    base.train.rate_width = None
    d60 = small.size_of(60, 4, 6, batch_size=8, steps=400)
    of_d60 = tuple(f"{name}_{rate:g}" for name in D60 for rate in RATES)
    return Suite(
        name="rates",
        base=base,
        arms=grid,
        sizes={
            "42k": Size(small.size_of(36, 2, 2, batch_size=4, steps=420), seeds=1),
            "d60": Size(d60, seeds=1, arms=of_d60),
        },
        baseline="moe_aux_0.02",
    )
