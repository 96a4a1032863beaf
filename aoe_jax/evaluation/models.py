"""A trained model, ready for use."""

import dataclasses
import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from aoe_jax.config import Config, MeshConfig
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.reading import is_model, load_params, read_begin_token, read_config, read_step
from aoe_jax.formats.tokenizer_files import read_prefix
from aoe_jax.model.decoder import Decoder
from aoe_jax.model.decoding import unstacked
from aoe_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    fill_mesh,
    make_mesh,
    put_batch,
    state_shardings,
    with_shardings,
)
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
    routing_state: dict[
        str, jax.Array
    ]  # [L, ...] by name, what the selection method has beside parameters
    tokenizer: Tokenizer
    start: int  # the token before the first one of a text
    prefix: list[
        int
    ]  # what its tokenizer on the hub puts before every text that it is given; often nothing
    step: int | None  # of its training

    def put(self, batch):
        """Windows of tokenised texts on the devices, with `start` where they have the end of the
        text before.
        """
        inputs = np.where(
            batch["inputs"] == self.tokenizer.end_of_text, np.int32(self.start), batch["inputs"]
        )
        return put_batch(batch_sharding(self.mesh), batch | {"inputs": inputs})

    @functools.cached_property
    def by_layer(self):
        """A copy of the parameters for reading on after a cache, `decoding.unstacked`; made when it
        is first wanted.
        """
        with jax.set_mesh(self.mesh):
            return unstacked(self.decoder, self.params, self.mesh)


def load_model(directory: Path, step="newest", mesh=None):
    """Loads the `Model` of a training run, or one as safetensors: of the hub, of `aoe_jax.export`
    or `aoe_jax.convert`.

    Args:
      directory: the run's `--workdir`, or that of the model.
      step: which checkpoint of the run: "newest", "best" or a number of steps.
      mesh: how it lies on the devices, as in `mesh_axes`, such as "fsdp=4"; None: see
        `on_devices_here`.

    Raises:
      UserError: there is no such model, it can't be read, or doesn't lie so.
    """
    axes = mesh_axes(mesh)
    if is_model(directory):
        return _of_files(directory, step, axes)
    config = on_devices_here(
        Config.from_config_dict(read_config_json(directory / "config.json")), axes
    )
    mesh = make_mesh(config, jax.devices())
    checkpoints = Checkpoints(directory)
    step = checkpoints.find(step)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(config, config.train.seed))
        params, routing_state = checkpoints.restore_model(
            step, with_shardings(abstract, state_shardings(mesh, abstract))
        )
    tokenizer = load_tokenizer(saved_tokenizer(directory), setting="the tokenizer of the run")
    return Model(
        config,
        Decoder.from_config(config),
        mesh,
        params,
        routing_state,
        tokenizer,
        tokenizer.end_of_text,
        [],
        step,
    )


def _of_files(directory, step, axes):
    there = read_step(directory)
    if step != "newest" and (there is None or step != str(there)):
        raise UserError(
            f"--step={step}: {directory} is a single model{'' if there is None else f', of step {there}'}"
        )
    config = on_devices_here(read_config(directory), axes)
    mesh = make_mesh(config, jax.devices())
    params, routing_state = load_params(directory, config, mesh)
    tokenizer = load_tokenizer(saved_tokenizer(directory), setting="the tokenizer of the model")
    begin = read_begin_token(directory, config.model.vocab_size)
    start = tokenizer.end_of_text if begin is None else begin
    prefix = read_prefix(directory, tokenizer, begin)
    return Model(
        config,
        Decoder.from_config(config),
        mesh,
        params,
        routing_state,
        tokenizer,
        start,
        prefix,
        there,
    )


def on_devices_here(config, axes=None):
    """The configuration on a mesh of all devices here.

    Args:
      config: of the model.
      axes: devices along some axes of the mesh, such as `{"fsdp": 4}`, the rest along `data`; None:
        those of training or, where these don't fit, all along `data`, so that each device holds the
        whole model.

    Returns:
      The configuration. Batches may be larger, so that the devices divide them; only expert choice
      depends on that.

    Raises:
      UserError: the axes don't make up the devices, or something doesn't divide by them.
    """
    n = jax.device_count()
    if axes is None:
        try:
            return fill_mesh(config, n)
        except UserError:
            axes = {name: getattr(config.mesh, name) for name in ("fsdp", "expert", "tensor")}
        if n % math.prod(axes.values()):
            log.warning(
                "the mesh of training doesn't fit %d devices: each holds the whole model; see --mesh",
                n,
            )
            axes = {}
    rows = max(n // axes.get("tensor", 1), axes.get("fsdp", 1) * axes.get("expert", 1))
    batch_size = -(-config.train.batch_size // config.train.accumulate // rows) * rows
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulate=1)
    model = dataclasses.replace(config.model, unroll=1)  # more layers at once don't go with fsdp
    return fill_mesh(
        dataclasses.replace(config, model=model, mesh=MeshConfig(**axes), train=train), n
    )


def mesh_axes(text):
    """The axes of `--mesh`, such as `fsdp=4,expert=2`, for `on_devices_here`; None for None.

    Raises:
      UserError: it isn't written so.
    """
    if text is None:
        return None
    axes = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in MESH_AXES or name in axes or not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"--mesh={text}: write it as fsdp=4,expert=2; the axes are {', '.join(MESH_AXES)}"
            )
        axes[name] = int(number)
    return axes
