"""Prunes experts of a trained model: `python -m aoe_jax.prune --workdir=DIR --experts=D
--output=DIR [--method=NAME]`.

Experts with similar scores on the tokens of a corpus (`--data`, written like `data.name`) become
one. The methods, layer by layer, are UNCURL (Sarkar et al. 2024, arXiv 2409.01483) and baselines of
its paper:

- `uncurl`. With `H [tokens, Z]` the scores of Z experts and `S = (1 + cosine of columns of H) / 2`,
  spectral clustering of S gives D clusters (symmetric normalised Laplacian and k-means; the paper
  leaves the Laplacian open). The experts of a cluster are aligned to the one with the largest load,
  by the permutation of hidden units that brings their weights nearest, and averaged with their
  loads as weights.
- `frequency_merge`. The D experts with the largest loads are centres, and each other expert joins
  the centre most similar to it by S; merged like above.
- `greedy`. The D experts with the largest loads stay, others are dropped.

The scores of a router MoE are its logits, and its router is drawn anew, to be trained alone first
(`train.router_steps`). Only `greedy` keeps the router's columns of its experts, which the paper
doesn't mention.

AoE isn't in the paper. Its scores are norms, far from 0, so cosines are of centred norms. The low
rank of w_gate_down and w_gate_up is aligned too, by a rotation (Procrustes) in turn with the
permutation, twice. An average has smaller norms than its members, so w_gate_down of a merged expert
is scaled, and w_gate_up by the inverse, which keeps its output: its mean score over the tokens that
chose a member becomes the mean of their scores. There is no router to draw anew.

Differences from the paper: all layers get D experts, for layers are scanned and have equal shapes,
where the paper leaves out the first layer. Signs that w_up and w_down of a hidden unit could share
aren't aligned. MC-SMoE, another baseline, is left out.

Cost: a forward pass over `--tokens` of the train split, and another for the norms of merged AoE
experts; memory holds moments `[Z, Z]`, not scores. Merging an expert takes `O(f^2 d)`, and up to
`O(f^3)` to assign its f hidden units. The result is a model like that of `aoe_jax.export`, with
`prune.json`; `train.init_from` continues its training.
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
_TOKENS = flags.DEFINE_integer("tokens", 100_000, "tokens of the train and validation splits", 1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the tokens, of k-means and of a new router", 0)
_BASELINES = flags.DEFINE_bool("baselines", True, "score the other methods, too")


def main():
    """Prunes."""
    workdir, n_experts = cli.path_of(_WORKDIR, in_store=True), cli.required(_EXPERTS)
    output = cli.path_of(_OUTPUT, in_store=True)
    from aoe_jax.pruning.run import prune  # starts JAX

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
        baselines=_BASELINES.value,
    )


if __name__ == "__main__":
    cli.run(main)
