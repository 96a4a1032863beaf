"""Turns an MoE into an AoE, or a dense model into either.

    python -m aoe_jax.convert --checkpoint=DIR --output=DIR (--score_neurons=S | --d_low=R |
        --upcycle=moe|aoe --experts=N --top_k=K)

The router of an MoE is dropped.

- `--score_neurons=S` keeps every matrix of the experts. In each expert the S neurons that predict
  the router's choices best come first, and the norm (or with `--score=max` the largest) of their
  gate pre-activations is the expert's score. They are chosen on `--tokens` tokens of `--data`, see
  `conversion/scoring_neurons.py`.
- `--d_low=R` factorises the gate of every expert by a truncated singular value decomposition.

Every feed-forward layer of a dense model, which may be a training run, becomes a layer of
`--experts=N` experts, `--top_k=K` for each token. The experts are copies of the layer, or with
`--granularity=G` of its G pieces. `--noise` adds Gaussian noise to them. See
`conversion/upcycling.py`.

- `--upcycle=moe` draws a router.
- `--upcycle=aoe --score_neurons=S` keeps gates whole and gives each expert other neurons to score.

All other parameters stay. Train the result with `train.py --config=configs/finetune.py:OUTPUT`.
With `--score_neurons`, with `--upcycle` of a model of a run, or if `--data` is given, the command
reports the nll on held-out text before and after; for an MoE also how often the scores choose the
router's experts.
"""

from functools import partial

from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.storage.paths import local_copy

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the directory of a router MoE; for --upcycle, of a dense model or run"
)
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer("d_low", None, "the rank of every expert's factorised gate", 1)
_NEURONS = flags.DEFINE_integer("score_neurons", None, "neurons of a whole gate that score", 1)
_SCORE = flags.DEFINE_enum("score", "norm", ["norm", "max"], "score of these neurons")
_UPCYCLE = flags.DEFINE_enum("upcycle", None, ["moe", "aoe"], "what to make of a dense model")
_EXPERTS = flags.DEFINE_integer("experts", None, "experts of an upcycled layer", 2)
_TOP_K = flags.DEFINE_integer("top_k", None, "experts of a token in an upcycled model", 1)
_GRANULARITY = flags.DEFINE_integer("granularity", 1, "pieces of the dense layer", 1)
_NOISE = flags.DEFINE_float(
    "noise", 0.0, "standard deviation of the noise in experts, relative to that of the matrix", 0.0
)
_MESH = cli.define_mesh_flag()
_DATA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_TOKENS = flags.DEFINE_integer("tokens", 8192, "tokens of the train and validation splits", 1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of tokens, of noise and of a drawn router", 0)


def main():
    checkpoint = local_copy(cli.path_of(_CHECKPOINT, in_store=True))
    output, measured = (
        cli.path_of(_OUTPUT, in_store=True),
        {"data": _DATA.value, "n_tokens": _TOKENS.value, "mesh": _MESH.value},
    )
    if _NEURONS.value is None:
        cli.refuse("belongs to --score_neurons", _SCORE)
    is_whole, is_aoe = _NEURONS.value is not None, _UPCYCLE.value == "aoe"
    if not _UPCYCLE.value:
        if is_whole == (_D_LOW.value is not None):
            raise UserError("--score_neurons and --d_low: give one of them, or --upcycle")
        cli.refuse("belongs to --upcycle", _EXPERTS, _TOP_K, _GRANULARITY, _NOISE)
        if not is_whole and not _DATA.present:
            cli.refuse("belongs to --score_neurons or --data", _MESH, _TOKENS, _SEED)
        from aoe_jax.conversion.from_router import convert, convert_summary  # starts JAX

        form = (_D_LOW.value, _NEURONS.value, _SCORE.value)
        summary = convert_summary(convert(checkpoint, output, *form, seed=_SEED.value, **measured))
    else:
        require_flag(_D_LOW.value is None, "d_low", _D_LOW.value, "gates stay whole with --upcycle")
        for flag in (_EXPERTS, _TOP_K):
            require_flag(flag.value is not None, flag.name, flag.value, "--upcycle needs it")
        wanted = "--upcycle=aoe needs it" if is_aoe else "belongs to --upcycle=aoe"
        require_flag(is_whole == is_aoe, "score_neurons", _NEURONS.value, wanted)
        from aoe_jax.conversion.upcycling import Upcycling, upcycle, upcycle_summary  # starts JAX
        from aoe_jax.formats.loading import is_of_run

        if not is_of_run(checkpoint) and not _DATA.present:
            cli.refuse("belongs to --data or to a model of a run", _MESH, _TOKENS)
        sizes = (_UPCYCLE.value, _EXPERTS.value, _TOP_K.value, _GRANULARITY.value)
        form = Upcycling(*sizes, _NEURONS.value, _SCORE.value, _NOISE.value, _SEED.value)
        summary = upcycle_summary(upcycle(checkpoint, output, form, **measured))
    print(f"{summary}; wrote {output}")


command = partial(cli.run, main)

if __name__ == "__main__":
    command()
