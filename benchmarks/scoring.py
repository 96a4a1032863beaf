"""Scoring of choices: reading a context once for all its continuations beside once for each.

`python -m benchmarks.scoring [--contexts=128] [--layers=4] [--repeats=3] [--json=FILE]`: the
default model, of random weights, scores random tokens in the shape of two kinds of task: contexts
of 60 to 120 tokens with four continuations of 15 to 35 (HellaSwag), and contexts of 180 to 240 with
three of one token (MNLI with three shots). Without sharing each call gets one continuation of every
context.
"""

import jax
import numpy as np
from absl import flags

from aoe_jax.config.run import Config
from aoe_jax.evaluation.log_likelihoods import Scorer
from aoe_jax.evaluation.models import Model
from aoe_jax.model.decoder import Decoder
from aoe_jax.sharding import fill_mesh, make_mesh
from aoe_jax.training.step import init_state
from benchmarks.timing import configuration, machine_in_words, medians, report, run_benchmark

# name: (tokens of a context, continuations, tokens of a continuation); numbers of tokens from, to.
SHAPES = {
    "4 continuations of 15 to 35 tokens after 60 to 120": ((60, 121), 4, (15, 36)),
    "3 continuations of 1 token after 180 to 240": ((180, 241), 3, (1, 2)),
}

_CONTEXTS = flags.DEFINE_integer("contexts", 128, "of each shape", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 4, "of the model", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each", lower_bound=1)


def random_model(config: Config):
    """A model of random weights on the devices here; it has no tokenizer."""
    config = fill_mesh(config, jax.device_count())
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(config, 0).params)()
    return Model(config, Decoder.from_config(config), mesh, params, None, None, 0, [], [], None)


def random_choices(n_contexts, shape, vocab_size):
    """`[[(context, continuation), ...]]`, the continuations of each context."""
    context_lengths, n, lengths = shape
    rng = np.random.default_rng(0)

    def draw(lengths):
        return rng.integers(0, vocab_size, rng.integers(*lengths)).tolist()

    contexts = [draw(context_lengths) for _ in range(n_contexts)]
    return [[(context, draw(lengths)) for _ in range(n)] for context in contexts]


def main():
    layers = {"n_layers": _LAYERS.value, "unroll": _LAYERS.value}
    model, figures = random_model(configuration("aoe", {"model": layers})), []
    scorer = Scorer(model)
    print(machine_in_words())
    for name, shape in SHAPES.items():
        choices = random_choices(_CONTEXTS.value, shape, model.config.model.vocab_size)
        together = [request for group in choices for request in group]
        apart = list(zip(*choices, strict=True))
        seconds = medians(
            {
                "together": lambda: scorer(together, progress=False),
                "apart": lambda: [scorer(requests, progress=False) for requests in apart],
            },
            _REPEATS.value,
        )
        ratio = seconds["apart"] / seconds["together"]
        figures.append({"shape": name, "seconds": seconds, "ratio": ratio})
        print(
            f"{name}: {seconds['apart']:.2f} s apart, {seconds['together']:.2f} s together, "
            f"ratio {ratio:.2f}",
            flush=True,
        )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
