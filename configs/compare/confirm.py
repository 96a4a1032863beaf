"""AoE with whole gates, AoE as published and the MoE at four sizes, 40 core-hours:
`--suite=configs/compare/confirm.py`.

Every size sees 20 tokens for each active parameter: 0.22, 0.8, 2.2 and 5.4 epochs of the embedded
corpus. Of the four scoring rates that `screen.py` offers to every arm, each has the one that did
best there in the first seed (1 for the MoE and for the largest neuron), and a learning rate that is
tuned at the smallest size. Wider models have it in inverse proportion to d_model. Arms without
L_aux (`none`, `free`: the loss-free bias) show how load balances by itself.
"""

from aoe_jax.compare.suite import Size, Suite, Tuning
from configs.compare.arms import aoe, moe, varied, whole_aoe
from configs.compare.small import MIDDLE, SMALLEST, base_config, size_of


def _whole(balance):
    return varied(whole_aoe(16, balance), train={"scoring_rate": 0.3})


ARMS = {
    "moe": moe("aux"),
    "aoe_whole": _whole("aux"),
    "aoe_whole_max": whole_aoe(16, "aux", "max"),
    "aoe_d3": varied(aoe(3, "aux"), train={"scoring_rate": 0.1}),
    "moe_none": moe("none"),
    "aoe_whole_none": _whole("none"),
    "moe_free": moe("free"),
    "aoe_whole_free": _whole("free"),
}
AT_ALL_SIZES = ("moe", "aoe_whole", "aoe_whole_max", "aoe_d3")
TUNING = Tuning((5e-3, 1e-2, 2e-2, 4e-2), steps=420)


def get_suite():
    return Suite(
        name="confirm",
        base=base_config(),
        arms=ARMS,
        sizes={
            "42k": Size(SMALLEST, seeds=5),
            "149k": Size(MIDDLE, seeds=5, arms=AT_ALL_SIZES, rate_factor=36 / 48),
            "419k": Size(
                size_of(72, 5, 4, batch_size=8, steps=4100),
                seeds=3,
                arms=AT_ALL_SIZES,
                rate_factor=36 / 72,
            ),
            "1M": Size(
                size_of(96, 7, 4, batch_size=16, steps=5040),
                seeds=3,
                arms=AT_ALL_SIZES,
                rate_factor=36 / 96,
            ),
        },
        baseline="moe",
        tuning=TUNING,
    )
