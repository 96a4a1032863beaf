"""Compares experts chosen by scores in bfloat16 with those chosen by scores in float32.

`python -m benchmarks.precision --workdir=DIR [--tokens=16384] [--json=FILE]`; DIR is a run or a
model. Each layer scores the same inputs, rounded to bfloat16, twice: with weights in bfloat16, as
models with `model.dtype=bfloat16` do, and with weights and products in float32. It prints the share
of the K best experts in float32 that are also the K best in bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.choices import overlap
from aoe_jax.config.checks import require_flag
from aoe_jax.conversion.observations import observations
from aoe_jax.evaluation.models import corpus_of, first_batches, load_model
from aoe_jax.moe.scoring import SCORE_OF_CODE, router_scores, scores_of_all
from benchmarks.timing import run_benchmark, save

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a run or of a model")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "validation tokens", lower_bound=1)


def chosen(x, weights, experts):
    """The K best experts of tokens `x [T, d]`: `[T, n]` bool."""
    if experts.has_router:
        scores = router_scores(x, weights, stride=1).values
    else:
        gate = weights["w_gate_down" if experts.low_rank else "w_gate"]
        columns = gate[..., : experts.sizes(x.shape[1])["r"]]
        scores = scores_of_all(x, columns, SCORE_OF_CODE[experts.score])
    best = jax.lax.top_k(scores, experts.top_k)[1]
    return jax.nn.one_hot(best, scores.shape[1], dtype=bool).any(axis=1)


def main():
    folder = cli.path_of(_WORKDIR)
    model = load_model(folder)
    experts = model.config.experts
    wanted = f"has experts.kind={experts.kind!r}; name an AoE or an MoE with a router"
    require_flag(experts.kind == "aoe" or experts.has_router, "workdir", folder, wanted)
    by_layer = model.params["layers"]["experts"]
    batches = first_batches(model, corpus_of(model, folder).validation.values(), _TOKENS.value)
    inputs = np.concatenate([x for *_, x in observations(model, batches, True)], axis=1)
    low, full = [], []
    for layer, x in enumerate(jnp.asarray(inputs, jnp.bfloat16)):
        weights = {name: a[layer] for name, a in by_layer.items()}
        low.append(chosen(x, weights, experts))
        with jax.default_matmul_precision("highest"):
            full.append(chosen(x.astype(jnp.float32), weights, experts))
    shares = overlap(np.stack(low), np.stack(full)).tolist()
    mean = float(np.mean(shares))
    of_layers = ", ".join(f"{share:.4f}" for share in shares)
    print(f"{mean:.4%} of {inputs.shape[1]} tokens' choices are equal (layers: {of_layers})")
    save({"tokens": inputs.shape[1], "layers": shares, "mean": mean})


if __name__ == "__main__":
    run_benchmark(main)
