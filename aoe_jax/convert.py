"""Turns an MoE into an AoE: `python -m aoe_jax.convert --checkpoint=DIR --output=DIR --d_low=R`.

The router is dropped, and the gate of every expert is factorised by a truncated singular value
decomposition, `w_gate = U S V^T`, into `w_gate_down = U_r S_r` and `w_gate_up = V_r^T`: then
`|x w_gate_down|` is the norm of the part of `x w_gate` that is kept. All else stays, and training
continues with `train.py --config=configs/finetune.py:OUTPUT`.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the directory of a router MoE")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_D_LOW = flags.DEFINE_integer("d_low", None, "the rank of every expert's factorised gate", 1)


def main():
    """Converts."""
    d_low, output = cli.required(_D_LOW), Path(cli.required(_OUTPUT))
    checkpoint = Path(cli.required(_CHECKPOINT))
    from aoe_jax.formats.conversion import convert  # starts JAX

    report = convert(checkpoint, output, d_low)
    print(f"energy kept: {report['energy_kept']['mean']:.4f} of all; wrote {output}")


if __name__ == "__main__":
    cli.run(main)
