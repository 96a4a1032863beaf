"""Results that nobody has trained for, of suites at any sizes."""

import math

import numpy as np

from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe
from aoe_jax.compare.results import Curve, Result
from aoe_jax.compare.suite import Size, Suite
from aoe_jax.config import Config
from aoe_jax.counts import parameter_counts, training_flops_per_token
from configs import tiny

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "aux"), "dense": DENSE, "active": DENSE_ACTIVE}


def size_at(flops, width, factor=1.0):
    """Of that many FLOPs for the MoE, by the number of steps."""
    changes = {
        "model": {"d_model": width, "n_layers": 2, "vocab_size": 512},
        "experts": {"d_ffn": 2 * width},
    }
    config = tiny.get_config("moe")
    for group, values in changes.items():
        config[group].update(values)
    per_step = (
        training_flops_per_token(Config.from_config_dict(config))
        * config.train.batch_size
        * config.data.seq_len
    )
    return Size(changes | {"train": {"steps": round(factor * flops / per_step)}}, seeds=2)


def comparison(sizes, loss):
    """Of results whose nll is `loss(run)`."""
    suite = Suite("s", tiny.get_config(), ARMS, sizes, "moe")
    return Comparison(suite, [invented_result(run, loss(run)) for run in suite.runs()])


def invented_result(run, nll, seconds_per_step=1.0, routing=None):
    """Of a finished run."""
    curve = Curve(np.array([1, 2]), np.array([6.0, 5.0]))
    nothing = {
        "timed_in_turn": True,
        "memory_bytes": 1.0,
        "load_entropy": math.nan,
        "dropped_share": math.nan,
    }
    return Result(
        run,
        "finished",
        "",
        nll,
        1.0,
        seconds_per_step,
        train=curve,
        validation=curve,
        routing=routing,
        **nothing,
    )


def active(run):
    return parameter_counts(run.config).active_non_embedding
