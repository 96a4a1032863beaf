"""Trains a model: `python train.py --config=FILE --workdir=DIR [--config.train.steps=N ...]`."""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.stopping import StopRequests
from aoe_jax.training.profile import steps_to_trace

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "the directory of the run, which continues from a checkpoint there"
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "STEP:N, trace N steps, beginning with step STEP, into WORKDIR/profile"
)
_WANDB = flags.DEFINE_string(
    "wandb", None, "a project of Weights & Biases that receives the figures too"
)


def main():
    """Trains."""
    stop = StopRequests()
    stop.listen()
    config = cli.parsed_config(_CONFIG)
    workdir = Path(cli.required(_WORKDIR))
    profile = steps_to_trace(_PROFILE.value) if _PROFILE.value is not None else range(0)
    distributed.start()
    from aoe_jax.training.loop import train  # JAX may start only after `distributed.start`

    train(config, workdir, stop, profile, _WANDB.value)


if __name__ == "__main__":
    cli.run(main)
