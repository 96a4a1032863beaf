"""Takes the model out of a training run: `python -m aoe_jax.export --workdir=DIR --output=DIR
[--step=N]`.

Safetensors and `config.json`, as Mixtral where that can say all of the model, else in a format of
our own, see `aoe_jax.formats`; the tokenizer as `transformers` takes it; and the configuration of
the run, by which `eval.py --workdir=OUTPUT` evaluates the model. `train.init_from` starts another
run from it.
"""

import logging
import shutil
from pathlib import Path

from absl import flags

from aoe_jax import cli

log = logging.getLogger("aoe_jax.export")  # not __name__, which is __main__ on the command line

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint: newest, best (lowest validation nll) or a number of steps"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the tensors; training has float32"
)


def export(workdir: Path, output: Path, which="newest", dtype="float32"):
    """Writes the model of a checkpoint to `output`, which comes into being only when it is
    complete.

    Args:
      workdir: of a training run.
      output: a directory that doesn't exist.
      which: "newest", "best" or a number of steps.
      dtype: of the tensors, "float32" or "bfloat16".

    Returns:
      The step of the checkpoint.

    Raises:
      UserError: there is no such checkpoint, it can't be read, or `output` exists or can't be
        written.
    """
    import jax

    from aoe_jax.config import Config
    from aoe_jax.evaluation.models import on_devices_here
    from aoe_jax.formats.configs import as_own, to_json
    from aoe_jax.formats.reading import RUN_FILE
    from aoe_jax.formats.tokenizer_files import write_tokenizer
    from aoe_jax.formats.writing import new_directory, write_arrays
    from aoe_jax.json_files import write_json
    from aoe_jax.sharding import make_mesh, state_shardings, with_shardings
    from aoe_jax.training.checkpoint import Checkpoints
    from aoe_jax.training.step import init_state
    from aoe_jax.training.workdir import read_config_json

    run_config = Config.from_config_dict(read_config_json(workdir / "config.json"))
    config = on_devices_here(run_config)
    run = Checkpoints(workdir)
    step = run.find(which)
    mesh = make_mesh(config, jax.devices())
    with new_directory(output) as partial_output, jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(config, config.train.seed))
        params, routing_state = run.restore_model(
            step, with_shardings(abstract, state_shardings(mesh, abstract))
        )
        values = as_own(config) if routing_state else to_json(config)
        values |= write_tokenizer(workdir, partial_output, config.model.max_len)
        write_arrays(partial_output, values, params, routing_state, dtype)
        write_json(partial_output / RUN_FILE, {"step": step, "config": run_config.to_dict()})
        shutil.copyfile(workdir / "data.json", partial_output / "data.json")
    log.info("wrote the model of step %d to %s, as %s", step, output, values["model_type"])
    return step


def main():
    """Exports."""
    export(Path(cli.required(_WORKDIR)), Path(cli.required(_OUTPUT)), _STEP.value, _DTYPE.value)


if __name__ == "__main__":
    cli.run(main)
