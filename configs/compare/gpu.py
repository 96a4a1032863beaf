"""Compares the arms of `confirm.py` that use L_aux, at 20M, 50M and 100M active parameters on GPU:
`--suite=configs/compare/gpu.py --set=data.name=prepared --set=data.path=STORE`.

Every size is trained on 20 tokens per active parameter (0.4B, 1B and 2.1B tokens). The embedded
corpus is too small, so STORE is a token store that `python -m aoe_jax.prepare` wrote, with a
vocabulary of at most 32,000 tokens.

For whole gates on one H100, `aoe_jax.plan` estimates 4 minutes per run at 20M (90 ms per step) and
67 minutes per run at 100M (250 ms per step). You can stop the suite at any time, for example by
`timeout 600`, and the same command continues it. A run keeps the checkpoints of the middle and the
end of its training; the checkpoints of all runs need 120 GB.
"""

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs import paper
from aoe_jax.configs.compare.confirm import ARMS

TOKENS_PER_PARAMETER = 20
SEQUENCES, LENGTH = 128, 1024


def size_of(d_model, n_layers, active):
    """Returns the changes to the base for a size; steps are proportional to `active` parameters."""
    tenth = round(TOKENS_PER_PARAMETER * active / (SEQUENCES * LENGTH) / 10)
    return {
        "model": {"n_layers": n_layers, "n_heads": d_model // 64, "d_model": d_model},
        "experts": {"d_ffn": 2 * d_model},
        "train": {"steps": 10 * tenth, "eval_every": 2 * tenth},
        "checkpoint": {"every": tenth, "keep": 1, "keep_every": 5 * tenth},
    }


def get_suite():
    base = paper.get_config("moe_aux")
    base.balance.aux_tokens = 0.125  # only for AoE, because arms with a router set it to 1
    base.model.max_len = LENGTH
    base.data.seq_len = LENGTH
    base.train.update(
        batch_size=SEQUENCES,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        warmup=0.05,
        rate_width=384,
    )
    sizes = {"20M": (384, 8, 19e6), "50M": (512, 12, 50e6), "100M": (640, 16, 105e6)}
    return Suite(
        name="gpu",
        base=base,
        arms={name: ARMS[name] for name in ("moe", "aoe_whole", "aoe_one", "aoe_d3")},
        sizes={name: Size(size_of(*shape), seeds=2) for name, shape in sizes.items()},
        baseline="moe",
    )
