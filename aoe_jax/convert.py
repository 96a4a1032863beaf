"""Turns a router MoE into an AoE, or a dense model into an MoE or an AoE.

    python -m aoe_jax.convert --checkpoint=DIR --output=DIR (--score_neurons=S | --d_low=R |
        --upcycle=moe|aoe --experts=N --top_k=K)

The router of an MoE is removed. `--score_neurons=S` finds the S neurons of each expert that predict
the router's choices best; they become the expert's first neurons and compute its score. `--d_low=R`
factorises the gates with rank R. `--upcycle` makes experts from the feed-forward layers of a dense
model; `conversion/upcycling.py` explains `--granularity` and `--noise`. The command reports the nll
on held-out text before and after the conversion if an MoE is converted with `--score_neurons`, if
the dense model is that of a run's workdir, or if `--data` is given. `finetune` trains the result.
"""

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the directory of a model or a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer("d_low", None, "the rank of every expert's factorised gate", 1)
_NEURONS = flags.DEFINE_integer("score_neurons", None, "how many neurons score an expert", 1)
_SCORE = flags.DEFINE_enum("score", "norm", ["norm", "max"], "how their activations give the score")
_UPCYCLE = flags.DEFINE_enum("upcycle", None, ["moe", "aoe"], "what a dense model becomes")
_EXPERTS = flags.DEFINE_integer("experts", None, "the number of experts of an upcycled layer", 2)
_TOP_K = flags.DEFINE_integer("top_k", None, "the experts per token of an upcycled model", 1)
_GRANULARITY = flags.DEFINE_integer("granularity", 1, "number of pieces of each dense layer", 1)
_NOISE = flags.DEFINE_float("noise", 0.0, "deviation of the noise / that of the matrix", 0.0)
_MESH = cli.define_mesh_flag()
_DATA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_TOKENS = flags.DEFINE_integer("tokens", 8192, "tokens from each split, train and validation", 1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of tokens, of noise and of a drawn router", 0)


def main():
    checkpoint = cli.path_of(_CHECKPOINT, in_store=True)
    output = cli.path_of(_OUTPUT, in_store=True)
    measured = {"data": _DATA.value, "n_tokens": _TOKENS.value, "mesh": _MESH.value}
    is_whole = _NEURONS.value is not None
    if not is_whole:
        cli.refuse("belongs to --score_neurons", _SCORE)
    if not _UPCYCLE.value:
        if is_whole == (_D_LOW.value is not None):
            raise UserError("--score_neurons and --d_low: give one of them, or --upcycle")
        cli.refuse("belongs to --upcycle", _EXPERTS, _TOP_K, _GRANULARITY, _NOISE)
        if not is_whole and not _DATA.value:
            cli.refuse("belongs to --score_neurons or --data", _TOKENS, _SEED)
        from aoe_jax.conversion.from_router import convert  # starts JAX

        form = (_D_LOW.value, _NEURONS.value, _SCORE.value)
        convert(checkpoint, output, *form, seed=_SEED.value, **measured)
    else:
        cli.refuse("gates stay whole with --upcycle", _D_LOW)
        if _UPCYCLE.value == "moe":
            cli.refuse("belongs to --upcycle=aoe", _NEURONS)
        elif not _NOISE.value:
            cli.refuse("belongs to --noise or --upcycle=moe", _SEED)
        from aoe_jax.conversion.upcycling import Upcycling, upcycle  # starts JAX
        from aoe_jax.formats.loading import is_model

        if not _DATA.value and is_model(checkpoint):
            cli.refuse("belongs to --data or the workdir of a run", _TOKENS)
        sizes = (cli.required(_EXPERTS), cli.required(_TOP_K), _GRANULARITY.value)
        scoring = (_NEURONS.value, _SCORE.value)
        form = Upcycling(_UPCYCLE.value, *sizes, *scoring, _NOISE.value, _SEED.value)
        upcycle(checkpoint, output, form, **measured)


command = cli.command(main)
