"""Takes the model out of a training run: `python -m aoe_jax.export --workdir=DIR --output=DIR [--step=N]`.

Parameters and selection bias without the optimiser's state, a third of a checkpoint, with configuration and tokenizer:
`eval.py --workdir=OUTPUT` evaluates it. It can't be trained on.
"""

import logging
import os
import shutil
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import UserError

log = logging.getLogger("aoe_jax.export")  # not __name__, which is __main__ on the command line

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint: newest, best (lowest validation nll) or a number of steps"
)


def export(workdir: Path, output: Path, which="newest"):
    """Writes the model of a checkpoint to `output`, which comes into being only when it is complete.

    Args:
      workdir: of a training run.
      output: a directory that doesn't exist.
      which: "newest", "best" or a number of steps.

    Returns:
      The step of the checkpoint.

    Raises:
      UserError: there is no such checkpoint, it can't be read, or `output` exists or can't be written.
    """
    import jax

    from aoe_jax.config import CheckpointConfig, Config
    from aoe_jax.evaluation.models import on_devices_here
    from aoe_jax.sharding import make_mesh, state_shardings, with_shardings
    from aoe_jax.training.checkpoint import Checkpoints
    from aoe_jax.training.step import init_state
    from aoe_jax.training.workdir import read_config_json

    if output.exists():
        raise UserError(f"--output={output} exists already; name a new directory")
    config = on_devices_here(Config.from_config_dict(read_config_json(workdir / "config.json")))
    run = Checkpoints(workdir)
    step = run.find(which)
    mesh = make_mesh(config, jax.devices())
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in workdir.glob("*"):
            if file.name in ("config.json", "data.json") or file.name.startswith("tokenizer."):
                shutil.copyfile(file, partial / file.name)
    except OSError as e:
        raise UserError(f"--output={output} can't be written: {e.strerror}") from e
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(config, config.train.seed))
        model = run.restore_model(step, with_shardings(abstract, state_shardings(mesh, abstract)))
        checkpoints = Checkpoints(partial, CheckpointConfig())
        checkpoints.save_model(step, *model)
        checkpoints.close()
    os.replace(partial, output)
    log.info("wrote the model of step %d to %s", step, output)
    return step


def main():
    """Exports."""
    export(Path(cli.required(_WORKDIR)), Path(cli.required(_OUTPUT)), _STEP.value)


if __name__ == "__main__":
    cli.run(main)
