"""AoE with whole gates, AoE as published and the MoE at four sizes, 40 core-hours:
`--suite=configs/compare/confirm.py`.

Every size sees 20 tokens for each active parameter: 0.22, 0.8, 2.2 and 5.4 epochs of the embedded
corpus. Of the four scoring rates that `screen.py` offers to every arm, each has the one that did
best there (1 for the MoE and for `aoe_one`, which a single signed neuron scores), and a learning
rate that is tuned at the smallest size. Wider models have it in inverse proportion to d_model. Arms
without L_aux (`none`, `free`: the loss-free bias) show how load balances by itself.
"""

from aoe_jax.compare.suite import Size, Suite
from configs.compare.arms import aoe, moe, varied, whole_aoe
from configs.compare.small import LARGEST, MIDDLE, SMALLEST, TUNING, base_config, size_of, wider


def _whole(balance):
    return varied(whole_aoe(16, balance), train={"scoring_rate": 0.3})


ARMS = {
    "moe": moe("aux"),
    "aoe_whole": _whole("aux"),
    "aoe_one": whole_aoe(1, "aux", "max"),
    "aoe_d3": varied(aoe(3, "aux"), train={"scoring_rate": 0.1}),
    "moe_none": moe("none"),
    "aoe_whole_none": _whole("none"),
    "moe_free": moe("free"),
    "aoe_whole_free": _whole("free"),
}
AT_ALL_SIZES = ("moe", "aoe_whole", "aoe_one", "aoe_d3")


def get_suite():
    return Suite(
        name="confirm",
        base=base_config(),
        arms=ARMS,
        sizes={
            "42k": Size(SMALLEST, seeds=5),
            "149k": wider(MIDDLE, 5, AT_ALL_SIZES),
            "419k": wider(LARGEST, 3, AT_ALL_SIZES),
            "1M": wider(size_of(96, 7, 4, batch_size=16, steps=5040), 3, AT_ALL_SIZES),
        },
        baseline="moe",
        tuning=TUNING,
    )
