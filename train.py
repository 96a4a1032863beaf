"""Trains a model: `python train.py --config=configs/tiny.py --workdir=DIR [--config.train.steps=N ...]`."""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.training.stopping import StopRequests

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of the run; one with a checkpoint goes on from it")


def main():
    """Trains."""
    stop = StopRequests()
    stop.listen()
    config = cli.parsed_config(_CONFIG)
    workdir = Path(cli.required(_WORKDIR))
    distributed.start()
    from aoe_jax.training.loop import train  # JAX starts only once the command line is known to be right

    train(config, workdir, stop)


if __name__ == "__main__":
    cli.run(main)
