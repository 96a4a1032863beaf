"""Trains a model: `python train.py --config=FILE --workdir=DIR`, see `aoe_jax/train.py`."""

from aoe_jax import cli
from aoe_jax.train import main

if __name__ == "__main__":
    cli.run(main)
