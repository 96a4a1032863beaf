"""Turns an MoE into an AoE.

    python -m aoe_jax.convert --checkpoint=DIR --output=DIR (--score_neurons=S | --d_low=R)

The router is dropped.

- `--score_neurons=S` keeps every matrix of the experts. In each expert the S neurons that predict
  the router's choices best come first, and the norm (or with `--score=max` the largest) of their
  gate pre-activations is the expert's score. The order of neurons leaves the expert's function
  unchanged. They are chosen greedily on `--tokens` tokens of `--data`, see
  `formats/scoring_neurons.py`.
- `--d_low=R` factorises the gate of every expert by a truncated singular value decomposition,
  `w_gate = U S V^T`, into `w_gate_down = U_r S_r` and `w_gate_up = V_r^T`: then `|x w_gate_down|`
  is the norm of the part of `x w_gate` that is kept.

All else stays, and training continues with `train.py --config=configs/finetune.py:OUTPUT`. With
`--score_neurons`, or if `--data` is given, the command reports on held-out text the nll before and
after, and how far the scores agree with the router.
"""

from functools import partial

from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.paths import local_copy

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the directory of a router MoE")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer("d_low", None, "the rank of every expert's factorised gate", 1)
_NEURONS = flags.DEFINE_integer("score_neurons", None, "neurons of a whole gate that score", 1)
_SCORE = flags.DEFINE_enum("score", "norm", ["norm", "max"], "score of these neurons")
_MESH = cli.define_mesh_flag()
_DATA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_TOKENS = flags.DEFINE_integer("tokens", 8192, "tokens of the train and validation splits", 1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the tokens of the train split", 0)


def main():
    """Converts."""
    checkpoint = local_copy(cli.path_of(_CHECKPOINT, in_store=True))
    output = cli.path_of(_OUTPUT, in_store=True)
    is_whole = _NEURONS.value is not None
    if is_whole == (_D_LOW.value is not None):
        raise UserError("--score_neurons and --d_low: give one of them")
    is_used = is_whole or not _SCORE.present
    require_flag(is_used, "score", _SCORE.value, "belongs to --score_neurons")
    for flag in (_MESH, _TOKENS, _SEED):
        is_used = is_whole or _DATA.present or not flag.present
        require_flag(is_used, flag.name, flag.value, "belongs to --score_neurons or --data")
    from aoe_jax.formats.conversion import convert, convert_summary  # starts JAX

    report = convert(
        checkpoint,
        output,
        _D_LOW.value,
        _NEURONS.value,
        _SCORE.value,
        data=_DATA.value,
        n_tokens=_TOKENS.value,
        seed=_SEED.value,
        mesh=_MESH.value,
    )
    print(f"{convert_summary(report)}; wrote {output}")


command = partial(cli.run, main)

if __name__ == "__main__":
    command()
