"""Fewer experts for a trained model: `python -m aoe_jax.prune --workdir=DIR --experts=D
--output=DIR [--method=NAME]`.

Experts whose scores go together over the tokens of a corpus (`--data`, written as `data.name`)
become one. Methods, layer by layer:

- `uncurl` (UNCURL, Sarkar et al. 2024, arXiv 2409.01483). With `H [tokens, Z]` the scores of Z
  experts, `S = (1 + cosine of columns of H) / 2`; spectral clustering of S into D clusters
  (symmetric normalised Laplacian, k-means; the paper leaves open which Laplacian). In a cluster
  each expert is aligned to the one that is chosen most often, by the permutation of hidden units
  that brings its weights nearest, and the aligned experts are averaged, weighed by how often they
  are chosen.
- `frequency_merge`, a baseline of the paper: the D experts that are chosen most often are centres,
  each of the others joins the one that it is most similar to by S; aligned and averaged as above.
- `greedy`, a baseline of the paper: the D experts that are chosen most often stay as they are, the
  others go.

A router MoE is pruned as in the paper: logits as they are, which lie around 0, and a router drawn
anew, to be trained alone first (`train.router_steps`). Only `greedy` keeps the router's columns of
its experts, of which the paper says nothing.

AoE isn't in the paper; for it three things are this project's own. Scores are norms, which lie far
from 0, so cosines are taken of norms less their means. The rank of Wdown and Wup is aligned too, by
a rotation (Procrustes), in turn with the permutation, twice. And as an average has smaller norms
than what it is of, and few would choose it, Wdown of a merged expert is scaled, and Wup by the
inverse, which leaves its output: its mean score over the tokens that chose a member becomes the
mean of the scores by which they did. There is no router to draw anew.

Not as in the paper: it expects no clusters in the first layer of experts and leaves that alone, but
here layers are scanned and have equal shapes, so all get D experts. Signs that Wp and Wo of a
hidden unit could share otherwise aren't aligned. MC-SMoE, another baseline of the paper, is left
out.

Cost: a forward pass over `--tokens` of the train split, and another for the norms of merged AoE
experts; of scores nothing is kept but moments `[Z, Z]`. An expert that is merged takes `O(f^2 d)`,
and up to `O(f^3)` for the assignment of its f hidden units. The result is a model as
`aoe_jax.export` writes it, with `prune.json`, from which `train.init_from` goes on.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint of a run: newest, best or a number of steps"
)
_MESH = cli.define_mesh_flag()
_EXPERTS = flags.DEFINE_integer("experts", None, "how many experts each layer is to have", 1)
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_METHOD = flags.DEFINE_enum(
    "method", "uncurl", ["uncurl", "frequency_merge", "greedy"], "how experts are chosen"
)
_DATA = flags.DEFINE_string(
    "data", None, "corpora to go by, written as in data.name; by default those of the run"
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 100_000, "tokens of the train split to go by, about, and of validation", 1
)
_SEED = flags.DEFINE_integer("seed", 0, "of these tokens, of k-means and of a new router", 0)
_BASELINES = flags.DEFINE_bool("baselines", True, "score what the other methods would give, too")


def main():
    """Prunes."""
    workdir, n_experts, output = (
        cli.required(_WORKDIR),
        cli.required(_EXPERTS),
        cli.required(_OUTPUT),
    )
    from aoe_jax.pruning.run import (
        prune,
    )  # JAX starts only once the command line is known to be right

    prune(
        Path(workdir).expanduser(),
        Path(output).expanduser(),
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
