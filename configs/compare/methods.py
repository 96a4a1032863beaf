"""Methods of expert selection at the smallest size of `small.py`, each with AoE and with a router: `--suite=configs/compare/methods.py`.

Arms are the variants of `configs/methods.py`. Learning rates are those that `small.py` found for AoE and for the router at
this size with L_aux; tuning each arm would take longer than all runs.
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
    return Suite(
        name="methods",
        base=base_config(),
        arms={variant: _arm(variant) for variant in methods.VARIANTS},
        sizes={"42k": Size(SMALLEST, seeds=3)},
        baseline="top_k",
    )
