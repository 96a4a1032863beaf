"""Writes the model of a run as safetensors, for transformers.

    python -m aoe_jax.export --workdir=DIR --output=DIR

The result is safetensors and `config.json`, a Mixtral where Mixtral can express the whole model,
else our own format (`aoe_jax/formats/architectures.py`), for AoE with classes for `transformers`;
the tokenizer as `transformers` reads it; a model card, `README.md`; and the configuration of the
run, so that `eval.py --workdir=OUTPUT` evaluates the model. `train.init_from` starts another run
from it.
"""

import logging
from functools import partial

from absl import flags

from aoe_jax import cli

log = logging.getLogger("aoe_jax.export")  # not __name__, which is __main__ on the command line

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the tensors")


def main():
    """Exports."""
    workdir, output = cli.path_of(_WORKDIR, in_store=True), cli.path_of(_OUTPUT, in_store=True)
    from aoe_jax.evaluation.models import load_model
    from aoe_jax.formats.configs import to_json
    from aoe_jax.formats.model_card import write_card
    from aoe_jax.formats.tokenizer_files import write_tokenizer
    from aoe_jax.formats.writing import new_directory, write_arrays, write_run
    from aoe_jax.training.workdir import read_run_config

    config = read_run_config(workdir / "config.json")
    with new_directory(output) as partial_output:
        model = load_model(workdir, _STEP.value)
        values = to_json(model.config, model.routing_state)
        values |= write_tokenizer(workdir, partial_output, config.model.max_len)
        write_arrays(partial_output, values, model.params, model.routing_state, _DTYPE.value)
        write_run(partial_output, workdir, model.step, config)
        write_card(partial_output, output.name, values, config, workdir, model.step)
    log.info("wrote the model of step %d to %s, as %s", model.step, output, values["model_type"])


command = partial(cli.run, main)

if __name__ == "__main__":
    command()
