"""Compares the MoE, the published AoE, and AoE with whole gates at four sizes, in 14 core-hours:
`--suite=configs/compare/confirm.py`.

Every size is trained on 20 tokens per active parameter: 0.22, 0.8, 2.2 and 5.4 epochs of the
embedded corpus. The scoring rate, a factor of the learning rate of weights that compute scores, has
the value with the lowest mean loss in `screen.py`: 0.1 for the published AoE, 0.3 for the other
arms. Experts of `aoe_whole` have whole gates, and their score is the norm of 16 neurons. In
`aoe_one` the score is the value of one neuron. At size 149k, seeds 0 to 2 repeat runs of
`screen.py`; seeds 3 and 4 are new. All arms have the same best learning rate (`rates.py`), scaled
by 1 / d_model at larger sizes. The larger two sizes leave out `aoe_one`. Only the smallest size has
the arms without L_aux: `none` arms have no balancing, `free` arms have the loss-free bias.
"""

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs.compare.arms import aoe, moe, varied, whole_aoe
from aoe_jax.configs.compare.small import LARGEST, MIDDLE, SMALLEST, base_config, size_of


def _at_rate(rate, arm):
    return varied(arm, train={"scoring_rate": rate})


ARMS = {
    "moe": _at_rate(0.3, moe("aux")),
    "aoe_whole": _at_rate(0.3, whole_aoe(16, "aux")),
    "aoe_one": _at_rate(0.3, whole_aoe(1, "aux", "max")),
    "aoe_d3": _at_rate(0.1, aoe(3, "aux")),
    "moe_none": _at_rate(0.3, moe("none")),
    "aoe_whole_none": _at_rate(0.3, whole_aoe(16, "none")),
    "moe_free": _at_rate(0.3, moe("free")),
    "aoe_whole_free": _at_rate(0.3, whole_aoe(16, "free")),
}
AT_ALL_SIZES = ("moe", "aoe_whole", "aoe_d3")


def get_suite():
    return Suite(
        name="confirm",
        base=base_config(),
        arms=ARMS,
        sizes={
            "42k": Size(SMALLEST, seeds=5),
            "149k": Size(MIDDLE, 5, (*AT_ALL_SIZES, "aoe_one")),
            "419k": Size(LARGEST, 3, AT_ALL_SIZES),
            "1M": Size(size_of(96, 7, 4, batch_size=16, steps=5040), 3, AT_ALL_SIZES),
        },
        baseline="moe",
    )
