"""Ways to balance AoE at the size of `configs/tiny.py`: `--suite=configs/compare/balance.py`.

L_aux from all tokens, L_aux from an eighth of them, or a selection bias without a loss; beside an
MoE. Each run has half of the steps of the default job.
"""

from aoe_jax.compare.suite import Size, Suite
from configs import tiny
from configs.compare.arms import ALL_TOKENS, aoe, moe, varied


def get_suite():
    base = tiny.get_config()
    base.train.steps = 350
    return Suite(
        name="balance",
        base=base,
        arms={
            "aoe_all_tokens": varied(aoe(4, "aux"), balance=ALL_TOKENS),
            "aoe_aux": varied(aoe(4, "aux"), balance={"aux_tokens": 0.125}),
            "aoe_free": aoe(4, "free"),
            "moe_aux": moe("aux"),
        },
        sizes={"tiny": Size({}, seeds=3)},
        baseline="aoe_all_tokens",
    )
