"""Methods of expert selection at the smallest size of `small.py`: `--suite=configs/compare/methods.py`.

Arms are the variants of `configs/methods.py`, most of them with AoE and with a router. All have the learning rate that
`small.py` found to be the best for AoE and for the router alike: tuning each would take longer than all runs.
"""

from aoe_jax.compare.suite import Arm, Size, Suite
from configs import methods
from configs.compare.small import SMALLEST, base_config


def _arm(variant):
    name = variant.removesuffix("_router")

    def changes(config):
        found = methods.changes(variant)
        found["experts"] = {"d_low": config.model.d_model // 3} | found["experts"]
        return found

    return Arm(f"{'router' if variant != name else 'AoE'}, {name.replace('_', ' ')}", changes)


def get_suite():
    base = base_config()
    base.train.update(learning_rate=2e-2, final_learning_rate=8e-4)
    return Suite(
        name="methods",
        base=base,
        arms={variant: _arm(variant) for variant in methods.VARIANTS},
        sizes={"42k": Size(SMALLEST, seeds=3)},
        baseline="top_k",
    )
