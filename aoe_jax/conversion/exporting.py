"""Writes the model of a run as safetensors and `config.json`."""

import logging
from pathlib import Path

from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.model_card import training, write_card
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import new_directory, write_arrays, write_run
from aoe_jax.storage.config_files import read_run_config

log = logging.getLogger(__name__)


def export(workdir: Path, output: Path, step="newest", dtype="float32"):
    """Writes the model of a checkpoint to `output`, which appears only once it is complete.

    `step` is "newest", "best" or a number; `dtype` is that of the tensors. Raises `UserError` if
    the run cannot be read or has no such step, and as `new_directory` does.
    """
    config = read_run_config(workdir / "config.json")
    with new_directory(output) as partial_output:
        model = load_model(workdir, step)
        values = to_json(model.config, model.routing_state)
        values |= write_tokenizer(workdir, partial_output, config.model.max_len)
        write_arrays(partial_output, values, model.params, model.routing_state, dtype)
        write_run(partial_output, workdir, model.step, config)
        origin = training(config, workdir, model.step)
        write_card(partial_output, output.name, values, config, origin)
    log.info("wrote the model of step %d to %s, as %s", model.step, output, values["model_type"])
