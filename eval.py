"""Evaluates a model: `python eval.py --workdir=DIR`, see `aoe_jax/eval.py`."""

from aoe_jax import cli
from aoe_jax.eval import main

if __name__ == "__main__":
    cli.run(main)
