"""Compares AoE, MoE and dense at three sizes, in 8 core-hours: `--suite=configs/compare/small.py`.

The MoE and AoE arms have 42k, 149k and 418k active parameters without embeddings; the last size is
called "419k". Every size is trained on 20 tokens per active parameter: 0.22, 0.8 and 2.2 epochs of
the embedded corpus. The dense arm has the same total parameters (3.2 times as many active ones) and
the same tokens. Each arm has its best learning rate (`rates.py`) at the smallest size; at larger
sizes this rate is scaled by 1 / d_model. Only the smallest size has the two arms without balancing.
"""

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs import tiny
from aoe_jax.configs.compare.arms import DENSE, aoe, at_learning_rate, moe

ARMS = {
    "moe_aux": moe("aux"),
    "moe_free": at_learning_rate(4e-2, moe("free")),
    "aoe_d6_aux": aoe(6, "aux"),
    "aoe_d3_aux": aoe(3, "aux"),
    "aoe_d3_free": aoe(3, "free"),
    "dense": at_learning_rate(4e-2, DENSE),
    "moe_none": moe("none"),
    "aoe_d3_none": aoe(3, "none"),
}
AT_ALL_SIZES = tuple(arm for arm in ARMS if not arm.endswith("_none"))


def size_of(d_model, n_layers, n_heads, batch_size, steps):
    """Returns the changes to the base for a size."""
    tenth = steps // 10
    return {
        "model": {"n_layers": n_layers, "unroll": n_layers, "n_heads": n_heads, "d_model": d_model},
        "experts": {"d_ffn": 2 * d_model},
        "train": {
            "batch_size": batch_size,
            "steps": steps,
            "warmup": (steps // 20) / steps,
            "eval_every": 2 * tenth,
        },
        "checkpoint": {"every": tenth, "keep": 1, "keep_every": tenth},
    }


SMALLEST = size_of(36, 2, 2, batch_size=4, steps=840)
MIDDLE = size_of(48, 4, 4, batch_size=8, steps=1480)
LARGEST = size_of(72, 5, 4, batch_size=8, steps=4100)


def base_config():
    """Returns the configuration that all runs share."""
    base = tiny.get_config("published")
    base.model.vocab_size = 1024  # keeps the embeddings small, and splits the text into more tokens
    width = SMALLEST["model"]["d_model"]
    base.train.update(learning_rate=2e-2, final_learning_rate=8e-4, rate_width=width, log_every=10)
    return base


def get_suite():
    return Suite(
        name="small",
        base=base_config(),
        arms=ARMS,
        sizes={
            "42k": Size(SMALLEST, seeds=3),
            "149k": Size(MIDDLE, 3, AT_ALL_SIZES),
            "419k": Size(LARGEST, 2, AT_ALL_SIZES),
        },
        baseline="moe_aux",
    )
