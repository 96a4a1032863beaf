"""Tests the comparison itself, in minutes on two CPU cores: `--suite=configs/compare/tiny.py`.

It trains two sizes with two seeds on the embedded corpus, and measures step times of the smaller
size with 4, 8 and 16 experts. Training is far too short to show which arm is better.
"""

from aoe_jax.compare.suite import Size, Suite, Sweep
from aoe_jax.configs import tiny
from aoe_jax.configs.compare.arms import DENSE, aoe, moe


def get_suite():
    base = tiny.get_config("published")
    base.model.update(vocab_size=1024)
    base.data.update(seq_len=128)
    base.train.update(steps=100, warmup=0.1, eval_every=50, log_every=5)
    base.checkpoint.update(every=25, keep=1, keep_every=25)
    sizes = {
        "d24": {
            "model": {"n_layers": 2, "unroll": 2, "n_heads": 2, "d_model": 24},
            "experts": {"d_ffn": 48},
        },
        "d48": {
            "model": {"n_layers": 2, "unroll": 2, "n_heads": 4, "d_model": 48},
            "experts": {"d_ffn": 96},
        },
    }
    return Suite(
        name="tiny",
        base=base,
        arms={
            "moe_aux": moe("aux"),
            "moe_free": moe("free"),
            "aoe_aux": aoe(3, "aux"),
            "aoe_free": aoe(3, "free"),
            "dense": DENSE,
        },
        sizes={name: Size(changes, seeds=2) for name, changes in sizes.items()},
        baseline="moe_aux",
        throughput={"experts": Sweep("experts.n_experts", (4, 8, 16), sizes["d24"])},
        routing_tokens=8192,
    )
