"""A trained model, ready for use."""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from aoe_jax.config import Config, MeshConfig
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.reading import is_model, load_params, read_begin_token, read_config, read_step
from aoe_jax.model.decoder import Decoder
from aoe_jax.model.decoding import unstacked
from aoe_jax.sharding import fill_mesh, make_mesh, state_shardings, with_shardings
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.step import init_state
from aoe_jax.training.workdir import read_config_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model on the devices of this process, or of all processes of a run of several."""

    config: Config  # its mesh is that of `mesh`
    decoder: Decoder
    mesh: Mesh
    params: dict  # of the decoder, as in training, stacked over layers; float32, or as the files of a model have them
    selection_bias: jax.Array | None  # [L, n] float32, of loss-free balancing
    tokenizer: Tokenizer
    start: int  # the token before the first one of a text
    step: int | None  # of its training

    @functools.cached_property
    def by_layer(self):
        """A copy of the parameters for reading on after a cache, `decoding.unstacked`; made when it is first wanted."""
        with jax.set_mesh(self.mesh):
            return unstacked(self.decoder, self.params, self.mesh)


def load_model(directory: Path, step="newest"):
    """Loads the `Model` of a training run, or one as safetensors: of the hub, of `aoe_jax.export` or `aoe_jax.convert`.

    Args:
      directory: the run's `--workdir`, or that of the model.
      step: which checkpoint of the run: "newest", "best" or a number of steps.

    Raises:
      UserError: there is no such model, or it can't be read.
    """
    if is_model(directory):
        return _of_files(directory, step)
    config = on_devices_here(Config.from_config_dict(read_config_json(directory / "config.json")))
    mesh = make_mesh(config, jax.devices())
    checkpoints = Checkpoints(directory)
    step = checkpoints.find(step)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(config, config.train.seed))
        params, selection_bias = checkpoints.restore_model(
            step, with_shardings(abstract, state_shardings(mesh, abstract))
        )
    tokenizer = load_tokenizer(saved_tokenizer(directory), setting="the tokenizer of the run")
    return Model(
        config, Decoder.from_config(config), mesh, params, selection_bias, tokenizer, tokenizer.end_of_text, step
    )


def _of_files(directory, step):
    there = read_step(directory)
    if step not in ("newest", str(there)):
        raise UserError(f"--step={step}: {directory} is a single model{'' if there is None else f', of step {there}'}")
    config = on_devices_here(read_config(directory))
    mesh = make_mesh(config, jax.devices())
    params, selection_bias = load_params(directory, config, mesh)
    tokenizer = load_tokenizer(saved_tokenizer(directory), setting="the tokenizer of the model")
    begin = read_begin_token(directory)
    start = tokenizer.end_of_text if begin is None else begin
    return Model(config, Decoder.from_config(config), mesh, params, selection_bias, tokenizer, start, there)


def on_devices_here(config):
    """The configuration on the mesh it was trained on, or, where that isn't here, with all devices along `data`.

    Batches may then be larger, so that the devices divide them. Only expert choice depends on that.
    """
    n = jax.device_count()
    try:
        return fill_mesh(config, n)
    except UserError:
        log.info("the mesh of the training run doesn't fit %d devices: batches are split over all of them", n)
        batch_size = -(-config.train.batch_size // config.train.accumulate // n) * n
        train = dataclasses.replace(config.train, batch_size=batch_size, accumulate=1)
        return dataclasses.replace(config, mesh=MeshConfig(data=n), train=train)
