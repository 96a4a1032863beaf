"""Reads models from safetensors: the configuration, and the parameters directly into a mesh."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aoe_jax.config.run import Config
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.architectures import ARCHITECTURES, ROUTING_STATE
from aoe_jax.formats.configs import computed_fields, from_json
from aoe_jax.formats.layout import Layout, is_layered, parameter_path
from aoe_jax.formats.tensor_files import TensorFiles
from aoe_jax.json_files import read_json
from aoe_jax.model.decoder import Decoder, initial_routing_state
from aoe_jax.sharding import replicated, state_shardings

RUN_FILE = "aoe_jax.json"  # of an exported model: {"step": number, "config": that of its run}
_WANTED = "name a directory with a model's config.json and safetensors files"


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model rather than a training run.

    The `config.json` of a model has a `model_type`.
    """
    path = directory / "config.json"
    return path.exists() and "model_type" in read_json(path, _WANTED)


def read_config(directory: Path) -> Config:
    """The configuration of a model in a directory.

    A model that `aoe_jax.export` wrote has the configuration of its run. For another, the groups
    `model` and `experts` come from `config.json`, `data.tokenizer` is the directory's, and other
    groups have their defaults; `model.dtype` is that of the embedding table, float32 for float16.

    Raises:
      UserError: a file can't be read, the architecture is unknown, or something in it isn't
        implemented here.
    """
    path, table = directory / "config.json", "model.embed_tokens.weight"
    config = from_json(path, read_json(path, _WANTED))
    files = TensorFiles(directory)
    if table in files.stored and files.stored[table].dtype.name == "bfloat16":
        model = dataclasses.replace(config.model, dtype="bfloat16")
        config = dataclasses.replace(config, model=model)
    if (directory / RUN_FILE).exists():
        return _config_of_run(directory, config)
    tokenizer = saved_tokenizer(directory)
    tokenizer = str(tokenizer) if tokenizer.exists() else None
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return dataclasses.replace(config, data=data)


def _config_of_run(directory, config):
    path = directory / RUN_FILE
    groups = read_json(path, _WANTED).get("config")
    if not isinstance(groups, dict):
        wanted = "it has no configuration of a run; remove it to do without"
        raise UserError(f"{path} can't be read: {wanted}")
    try:
        of_run = Config.from_config_dict(groups)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    here, there = computed_fields(config), computed_fields(of_run)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            values = f"{there.get(name)!r} there, {here.get(name)!r} in config.json"
            raise UserError(f"{path}: config.{name} is {values}; they must agree")
    return of_run


def read_step(directory: Path) -> int | None:
    """The step of the run that a model was exported from, or None."""
    path = directory / RUN_FILE
    return read_json(path, _WANTED).get("step") if path.exists() else None


def read_begin_token(directory: Path, vocab_size: int) -> int | None:
    """The token that texts begin with, or None.

    Raises:
      UserError: `bos_token_id` is no token.
    """
    path = directory / "config.json"
    token = read_json(path, _WANTED).get("bos_token_id")
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        wanted = f"must be the number of one of {vocab_size} tokens, or null"
        raise UserError(f"{path}: bos_token_id={token!r}: {wanted}")
    return token


def abstract_parameters(config: Config):
    """The tree of the decoder's parameters as shapes."""
    # The mesh must divide the batch.
    shape = (config.train.batch_size // config.train.accumulate, config.data.seq_len)
    decoder = Decoder.from_config(config)
    init = jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros(shape, jnp.int32)))
    return init["params"]


def parameter_shapes(config: Config):
    """The shape of every parameter by its path, with the axis of layers."""
    return _shapes(abstract_parameters(config))


def _shapes(tree):
    return {parameter_path(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(tree)}


class ModelReader:
    """The parameters of a model in a directory, read layer by layer and piece by piece."""

    def __init__(self, directory: Path, config: Config):
        """Checks that the files have every tensor of the model and no other; reads no tensor.

        Raises:
          UserError: see `TensorFiles`; or a tensor is missing, unknown, or has another shape or
            dtype than it should.
        """
        self.directory, self._files = directory, TensorFiles(directory)
        self._model_type = read_json(directory / "config.json", _WANTED)["model_type"]
        self._tables = ARCHITECTURES[self._model_type].tensors
        self._n_layers = config.model.n_layers
        self.abstract = abstract_parameters(config)
        self.routing_state = self._state_shapes(config)
        self.shapes = _shapes(self.abstract) | {
            f"layers/{name}": shape for name, shape in self.routing_state.items()
        }
        self._layouts = {path: self._layout(path) for path in self.shapes}
        self._check_tensors()

    def _state_shapes(self, config):
        """The shapes of the routing state that the model's selection or the files have."""
        of_model = read_config(self.directory)
        state = jax.eval_shape(lambda: initial_routing_state(of_model))
        shapes = {name: a.shape for name, a in state.items()}
        sizes = {"n": config.experts.n_experts, "d": config.model.d_model}
        for path, rows in ROUTING_STATE.items():
            if self._find(path):
                shape = (self._n_layers, *(sizes[axis] for axis in rows[0].axes))
                shapes[path.removeprefix("layers/")] = shape
        return shapes

    def _find(self, path):
        """The row of a parameter's table that the files follow, or None."""
        for tensor in self._tables.get(path, ()):
            if tensor.name.format(layer=0, expert=0) in self._files.stored:
                return tensor
        return None

    def _layout(self, path):
        if path not in self._tables:
            what = f"a model of model_type {self._model_type!r} has no parameter {path}"
            raise UserError(f"{self.directory}: {what}")
        shape = self.shapes[path]
        tensor = self._find(path) or self._tables[path][0]
        return Layout(tensor, shape[1:] if is_layered(path) else shape)

    def _check_tensors(self):
        known = set()
        for path, layout in self._layouts.items():
            dtypes = {}
            for layer in range(self._n_layers) if is_layered(path) else (None,):
                for expert in layout.experts:
                    name = layout.name(layer, expert)
                    if name not in self._files.stored:
                        what = f"tensor {name} is missing, by config.json the model has it"
                        raise UserError(f"{self.directory}: {what}")
                    stored = self._files.stored[name]
                    if stored.shape != layout.shape:
                        shapes = f"{list(stored.shape)}, by config.json {list(layout.shape)}"
                        raise UserError(f"{stored.file}: tensor {name} is {shapes}")
                    dtypes.setdefault(stored.dtype, name)
                    known.add(name)
            if len(dtypes) > 1:
                names = " and ".join(f"{name} of {dtype}" for dtype, name in dtypes.items())
                raise UserError(f"{self.directory}: tensors {names} must be of the same type")
        ignored = "|".join(
            re.escape(name).replace(r"\{layer\}", r"\d+")
            for name in ARCHITECTURES[self._model_type].ignored
        )
        for name in sorted(self._files.stored.keys() - known):
            if not re.fullmatch(ignored, name):
                what = f"tensor {name} is unknown, by config.json the model has no such"
                raise UserError(f"{self._files.stored[name].file}: {what}")

    def dtype(self, path) -> np.dtype:
        """The dtype of a parameter's tensors."""
        return self._files.stored[self._layouts[path].name(0, 0)].dtype

    def layer(self, path: str, layer: int | None = None) -> np.ndarray:
        """The whole parameter of a layer, or one outside the layers (None), as the file has it."""
        bounds = [(0, size) for size in self.shapes[path]]
        if layer is None:
            return self.piece(path, bounds)
        return self.piece(path, [(layer, layer + 1), *bounds[1:]])[0]

    def piece(self, path: str, bounds: list[tuple[int, int]], dtype=None) -> np.ndarray:
        """A part of a parameter.

        Args:
          path: of the parameter.
          bounds: `(first, end)` of every axis, that of layers first.
          dtype: of the result; None: that of the file.

        Raises:
          UserError: a file can't be read.
        """
        layout = self._layouts[path]
        out = np.empty([end - first for first, end in bounds], dtype or self.dtype(path))
        if not is_layered(path):
            self._fill(out, layout, bounds, None)
            return out
        (first, end), *bounds = bounds
        for layer in range(first, end):
            self._fill(out[layer - first, ...], layout, bounds, layer)  # a view, of a scalar too
        return out

    def _fill(self, out, layout, bounds, layer):
        bounds = dict(zip(layout.sizes, bounds, strict=True))
        with self._files.open() as read:
            if not layout.of_experts:
                stored = read(layout.name(layer), layout.slices(bounds))
                out[...] = layout.from_file(stored, bounds)
                return
            first, end = bounds["n"]
            for expert in range(first, end):  # a tensor of all experts may be large
                one = bounds | {"n": (expert, expert + 1)}
                stored = read(layout.name(layer, expert), layout.slices(one))
                out[expert - first] = layout.from_file(stored, one)


def load_params(directory: Path, config: Config, mesh: Mesh, dtype=None):
    """Reads the parameters of a model, each device's piece by itself.

    The host holds one piece at a time: one parameter of all layers on one device.

    Args:
      directory: with `config.json` and safetensors files.
      config: of the model, such as `read_config` returns it, with the mesh `mesh`.
      mesh: the devices that share the parameters, split by `sharding.PARAMETER_AXES`.
      dtype: of the parameters; None: that of the files.

    Returns:
      `(params, routing_state)`: the tree of the decoder's parameters, and the state of its
      selection method, float32 arrays `[L, ...]` by name.

    Raises:
      UserError: a file can't be read, or a tensor is missing, unknown, or has another shape or
        dtype than it should.
    """
    reader = ModelReader(directory, config)

    def array(path, a, sharding):
        return _array(reader, parameter_path(path), a.shape, sharding, dtype)

    shardings = state_shardings(mesh, reader.abstract)
    params = jax.tree_util.tree_map_with_path(array, reader.abstract, shardings)
    state = {
        name: _array(reader, f"layers/{name}", shape, replicated(mesh), jnp.float32)
        for name, shape in reader.routing_state.items()
    }
    return params, state


def _array(reader, path, shape, sharding, dtype):
    # jax.make_array_from_callback would hold the pieces of all devices of this process at once.
    devices = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        piece = reader.piece(path, bounds, dtype)
        arrays += jax.block_until_ready([jax.device_put(piece, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
