"""Turns an MoE into an AoE: `python -m aoe_jax.convert --checkpoint=DIR --output=DIR --d_low=R`.

The router goes, and the gate of every expert is factorised by a truncated singular value
decomposition, `Wg = U S V^T`, into `Wdown = U_r S_r` and `Wup = V_r^T`: then `|x Wdown|` is the
norm of what is kept of `x Wg`. All else stays as it was, and `train.py
--config=configs/finetune.py:OUTPUT` goes on from there.
"""

import logging
from pathlib import Path

from absl import flags

from aoe_jax import cli

log = logging.getLogger("aoe_jax.convert")  # not __name__, which is __main__ on the command line

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the directory of a router MoE as safetensors"
)
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer(
    "d_low", None, "the rank that every expert's gate keeps", lower_bound=1
)


def main():
    """Converts."""
    d_low, checkpoint, output = (
        cli.required(_D_LOW),
        Path(cli.required(_CHECKPOINT)),
        Path(cli.required(_OUTPUT)),
    )
    from aoe_jax.formats.conversion import (
        convert,
    )  # JAX starts only once the command line is known to be right

    report = convert(checkpoint, output, d_low)
    print(f"energy kept: {report['energy_kept']['mean']:.4f} of all; wrote {output}")


if __name__ == "__main__":
    cli.run(main)
