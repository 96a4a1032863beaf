"""Turns a router MoE into an AoE, or a dense model into an MoE or an AoE.

    python -m aoe_jax.convert --checkpoint=DIR --output=DIR (--score_neurons=S | --d_low=R |
        --upcycle=moe|aoe --experts=N --top_k=K)

The router of an MoE is dropped. `--score_neurons=S` moves the S neurons that predict the router's
choices best to the front of each expert, and they score; `--d_low=R` factorises gates. `--upcycle`
makes experts of the layers of a dense model: `conversion/upcycling.py` explains `--granularity` and
`--noise`. With `--score_neurons`, with `--upcycle` of a model of a run, or with `--data`, the
command reports the nll on held-out text before and after. Train the result with
`train.py --config=configs/finetune.py:OUTPUT`.
"""

from functools import partial

from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.storage.paths import local_copy

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the directory of a model or a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer("d_low", None, "the rank of every expert's factorised gate", 1)
_NEURONS = flags.DEFINE_integer("score_neurons", None, "neurons of a whole gate that score", 1)
_SCORE = flags.DEFINE_enum("score", "norm", ["norm", "max"], "score of these neurons")
_UPCYCLE = flags.DEFINE_enum("upcycle", None, ["moe", "aoe"], "result of a dense model")
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
    output = cli.path_of(_OUTPUT, in_store=True)
    measured = {"data": _DATA.value, "n_tokens": _TOKENS.value, "mesh": _MESH.value}
    is_whole, is_aoe = _NEURONS.value is not None, _UPCYCLE.value == "aoe"
    if not is_whole:
        cli.refuse("belongs to --score_neurons", _SCORE)
    if not _UPCYCLE.value:
        if is_whole == (_D_LOW.value is not None):
            raise UserError("--score_neurons and --d_low: give one of them, or --upcycle")
        cli.refuse("belongs to --upcycle", _EXPERTS, _TOP_K, _GRANULARITY, _NOISE)
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

        sizes = (_UPCYCLE.value, _EXPERTS.value, _TOP_K.value, _GRANULARITY.value)
        form = Upcycling(*sizes, _NEURONS.value, _SCORE.value, _NOISE.value, _SEED.value)
        summary = upcycle_summary(upcycle(checkpoint, output, form, **measured))
    print(f"{summary}; wrote {output}")


command = partial(cli.run, main)

if __name__ == "__main__":
    command()
