"""Writes models of runs, and models made by commands, as safetensors and `config.json`."""

import logging
from pathlib import Path

from aoe_jax.config.run import Config
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.loading import RUN_FILE, is_of_run, parameter_shapes
from aoe_jax.formats.model_card import training, write_card
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import new_directory, parameters_of, write_model
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import write_json

log = logging.getLogger(__name__)


def export(workdir: Path, output: Path, step="newest", dtype="float32", mesh=None):
    """Writes the model of a checkpoint to `output`, which does not exist before it is complete.

    `step` is "newest", "best" or a number; parameters are saved in `dtype`. `mesh` is an argument
    of `load_model`. Raises `UserError` if the run cannot be read, has no such step, or `output`
    exists already or cannot be written.
    """
    config = read_run_config(workdir / "config.json")
    with new_directory(output) as directory:
        model = load_model(workdir, step, mesh)
        state = model.routing_state
        _, parameter = parameters_of(model.params, state, dtype)
        write_result(directory, workdir, model.step, config, parameter, state)
        write_card(directory, config, training(config, workdir, model.step))
    log.info("wrote the model of step %d to %s", model.step, output)


def write_result(directory: Path, source: Path, step, config: Config, parameter, state=None):
    """Writes a model that was made from `source`, with the tokenizer of `source` and, for a run,
    its configuration and `data.json`. `step` is the training step or None.
    `parameter(path, layer)` returns a parameter, see `write_model`. `state` is the routing state.
    """
    state = state or {}
    values = to_json(config, state) | write_tokenizer(source, directory, config.model.max_len)
    shapes = parameter_shapes(config) | {f"layers/{name}": a for name, a in state.items()}
    write_model(directory, values, shapes, parameter)
    if is_of_run(source):
        write_json(directory / RUN_FILE, {"step": step, "config": config.to_stored()})
        if (source / "data.json").exists():
            (directory / "data.json").write_bytes((source / "data.json").read_bytes())


def write_figures(directory: Path, source: Path, step, config: Config, command, report, result):
    """Writes `report` to `COMMAND.json`, and a model card with the `command` and its `result`."""
    write_json(directory / f"{command}.json", report)
    of_step = "" if step is None else f" (step {step:,})"
    made = f"`python -m aoe_jax.{command}` made this model of `{source.absolute().name}`{of_step}"
    origin = f"## Origin\n\n{made}: {result}. `{command}.json` has all figures."
    write_card(directory, config, origin)


def in_words(nll):
    """Formats `{name: negative log-likelihood}` as text."""
    return "nll: " + ", ".join(f"{name} {value:.4f}" for name, value in nll.items())
