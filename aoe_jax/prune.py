"""Prunes experts of a trained model.

    python -m aoe_jax.prune --workdir=DIR --experts=D --output=DIR [--method=NAME]

D experts remain in each layer. `uncurl` (Sarkar et al. 2024, arXiv 2409.01483) merges clusters of
similar experts. `frequency_merge` merges each expert into the most similar of the D experts with
the largest loads. `greedy` keeps these D experts and deletes all others. Similar experts are those
with similar scores on tokens of a corpus (`--data`). `aoe_jax/conversion/merging.py` has details.

The output has the format of `aoe_jax.export` and also a report, `prune.json`. `train.init_from=DIR`
continues the training of the pruned model.
"""

from absl import flags

from aoe_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_MESH = cli.define_mesh_flag()
_EXPERTS = flags.DEFINE_integer("experts", None, "how many experts each layer is to have", 1)
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_METHODS = ["uncurl", "frequency_merge", "greedy"]
_METHOD = flags.DEFINE_enum("method", "uncurl", _METHODS, "how experts are merged or dropped")
_DATA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_TOKENS = flags.DEFINE_integer("tokens", 100_000, "tokens from each split, train and validation", 1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the tokens, of k-means and of a new router", 0)


def main():
    workdir, n_experts = cli.path_of(_WORKDIR, in_store=True), cli.required(_EXPERTS)
    output = cli.path_of(_OUTPUT, in_store=True)
    from aoe_jax.conversion.pruning import prune  # starts JAX

    prune(
        workdir,
        output,
        n_experts,
        method=_METHOD.value,
        data=_DATA.value,
        n_tokens=_TOKENS.value,
        seed=_SEED.value,
        step=_STEP.value,
        mesh=_MESH.value,
    )


command = cli.command(main)
