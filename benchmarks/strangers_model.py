"""AoE in a model that this project did not write: the GPT in Flax NNX of `examples/nnx_model.py`.

`python -m benchmarks.strangers_model [--seeds=3] [--steps=600] [--json=FILE]` trains it on the
bytes of the embedded corpus with AoE layers, with MoE layers, with a SwiGLU of AoE's active size,
and without any feed-forward layer. A seed sets parameters and the order of the data, so runs of one
seed are pairs: differences are to AoE, seed by seed, with their standard error.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from aoe_jax import MoE
from aoe_jax.compare.statistics import mean
from aoe_jax.data.sotu import speech_files, split_of
from benchmarks.timing import report, run_benchmark
from examples.nnx_model import GPT, aoe, batch_of, losses, train

D_MODEL, N_LAYERS, LENGTH, BATCH = 64, 2, 64, 32


def moe(d_model, rngs):
    """An MoE layer as large as that of `examples.nnx_model.aoe`."""
    layer = MoE(n_experts=8, top_k=2, d_ffn=d_model)
    return nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(jnp.zeros((1, 1, d_model)))


class SwiGLU(nnx.Module):
    """A SwiGLU as wide as the two experts that process a token."""

    def __init__(self, d_model, rngs):
        """Makes the matrices."""
        make = lambda d_in, d_out: nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)  # noqa: E731
        self.gate, self.up = make(d_model, 2 * d_model), make(d_model, 2 * d_model)
        self.down = make(2 * d_model, d_model)

    def __call__(self, x):
        """`[..., d]` -> `([..., d], auxiliary outputs without a loss)`."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x)), NoAux


class NoAux:
    """The auxiliary outputs of a layer without experts."""

    loss = 0.0


MODELS = {
    "AoE": aoe,
    "MoE": moe,
    "SwiGLU of the active size": SwiGLU,
    "no feed-forward layer": None,
}


def corpus():
    """The bytes of the train and the validation split."""
    parts = {"train": [], "validation": [], "test": []}
    for index, file in enumerate(speech_files()):
        parts[split_of(index)].append(file.read_bytes())
    return (np.frombuffer(b"".join(parts[name]), np.uint8) for name in ("train", "validation"))


def validation_nll(model, text):
    """The mean negative log-likelihood over pieces of the text, the same for all models."""
    rng, score = np.random.default_rng(0), nnx.jit(losses)
    batches = (batch_of(text, rng, BATCH, LENGTH) for _ in range(16))
    return mean([float(score(model, batch)[1]) for batch in batches]).value


def main():
    (text, held_out), steps, figures = corpus(), flags.FLAGS.steps, []
    size = {"batch": BATCH, "length": LENGTH}
    for name, feed_forward in MODELS.items():
        found = []
        for seed in range(flags.FLAGS.seeds):
            shape = {"d_model": D_MODEL, "n_layers": N_LAYERS, "length": LENGTH}
            model = GPT(feed_forward, rngs=nnx.Rngs(seed), **shape)
            train(model, text, steps, seed, **size)
            found.append(validation_nll(model, held_out))
        n_parameters = sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
        first = figures[0]["nll"] if figures else found
        difference = mean([nll - of_aoe for nll, of_aoe in zip(found, first, strict=True)])
        figure = {
            "model": name,
            "parameters": n_parameters,
            "steps": steps,
            "nll": found,
            "mean_nll": mean(found).value,
            "difference": difference.value,
            "difference_error": difference.error,
        }
        figures.append(figure)
        print(
            f"{name:>25}: {n_parameters} parameters, validation nll {figure['mean_nll']:.3f}, "
            f"{figure['difference']:+.3f} +- {figure['difference_error']:.3f} to AoE",
            flush=True,
        )
    report(figures)


if __name__ == "__main__":  # only here, so that tests can import this beside other commands
    flags.DEFINE_integer("seeds", 3, "runs of each model", lower_bound=2)
    flags.DEFINE_integer("steps", 600, "training steps of each run", lower_bound=1)
    run_benchmark(main)
