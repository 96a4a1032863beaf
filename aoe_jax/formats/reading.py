"""Reads models from safetensors: configuration, and parameters straight into a mesh.

L layers, n experts.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aoe_jax.config import Config
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.architectures import ARCHITECTURES
from aoe_jax.formats.configs import computed_fields, from_json
from aoe_jax.formats.layout import ROUTING_STATE, Place, is_layered, parameter_path
from aoe_jax.formats.tensor_files import TensorFiles
from aoe_jax.json_files import read_json
from aoe_jax.model.decoder import Decoder, initial_routing_state
from aoe_jax.sharding import replicated, state_shardings

RUN_FILE = "aoe_jax.json"  # of a model that was exported: {"step": number, "config": the configuration of its run}
_WANTED = "name a directory with a model's config.json and safetensors files"


def is_model(directory: Path) -> bool:
    """Whether a directory is that of a model, not of a training run, by the `model_type` in its
    `config.json`.
    """
    path = directory / "config.json"
    return path.exists() and "model_type" in read_json(path, _WANTED)


def read_config(directory: Path) -> Config:
    """The configuration of a model in a directory.

    Of a model that `aoe_jax.export` wrote it is that of its run. Else the groups `model` and
    `experts` are what `config.json` says, `data.tokenizer` is the directory's, and other groups are
    at their defaults. `model.dtype` is then that of the embedding table in the files, float32 for
    float16.

    Raises:
      UserError: a file can't be read, the architecture is unknown, or it has something that isn't
        implemented here.
    """
    path, table = directory / "config.json", "model.embed_tokens.weight"
    config = from_json(path, read_json(path, _WANTED))
    files = TensorFiles(directory)
    if table in files and files.stored(table).dtype.name == "bfloat16":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, dtype="bfloat16")
        )
    if (directory / RUN_FILE).exists():
        return _config_of_run(directory, config)
    tokenizer = saved_tokenizer(directory)
    data = dataclasses.replace(
        config.data, tokenizer=str(tokenizer) if tokenizer.exists() else None
    )
    return dataclasses.replace(config, data=data)


def read_step(directory: Path) -> int | None:
    """The step of the run that a model was exported from, or None if it wasn't."""
    path = directory / RUN_FILE
    return read_json(path, _WANTED).get("step") if path.exists() else None


def read_begin_token(directory: Path, vocab_size: int) -> int | None:
    """The token that texts begin with, or None if they begin with none; UserError if it can't be."""
    path = directory / "config.json"
    token = read_json(path, _WANTED).get("bos_token_id")
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise UserError(
            f"{path}: bos_token_id={token!r}: must be the number of one of {vocab_size} tokens, or null"
        )
    return token


def _config_of_run(directory, config):
    path = directory / RUN_FILE
    groups = read_json(path, _WANTED).get("config")
    if not isinstance(groups, dict):
        raise UserError(
            f"{path} can't be read: it has no configuration of a run; remove it to do without"
        )
    try:
        of_run = Config.from_config_dict(groups)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    here, there = computed_fields(config), computed_fields(of_run)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{path}: config.{name} is {there.get(name)!r} there, {here.get(name)!r} in config.json; they must agree"
            )
    return of_run


def abstract_parameters(config: Config):
    """The tree of the decoder's parameters as shapes."""
    shape = (
        config.train.batch_size // config.train.accumulate,
        config.data.seq_len,
    )  # one that the mesh divides
    decoder = Decoder.from_config(config)
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros(shape, jnp.int32)))[
        "params"
    ]


def parameter_shapes(config: Config):
    """The shape of every parameter by its path, with the axis of layers."""
    return _shapes(abstract_parameters(config))


def _shapes(tree):
    return {parameter_path(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(tree)}


class ModelReader:
    """The parameters of a model in a directory, read layer by layer and piece by piece."""

    def __init__(self, directory: Path, config: Config):
        """Checks that the files have every tensor of the model, in its shape, and no other; reads
        none.

        Raises:
          UserError: see `TensorFiles`; or a tensor is missing, unknown, or has another shape or
            dtype than it should.
        """
        self.directory, self._files = directory, TensorFiles(directory)
        self._model_type = read_json(directory / "config.json", _WANTED)["model_type"]
        architecture = ARCHITECTURES[self._model_type]
        self._n_layers, self._architecture = config.model.n_layers, architecture
        self.abstract = abstract_parameters(config)
        shapes = _shapes(self.abstract)
        self.routing_state = self._state_shapes(config)
        self.shapes = shapes | {
            f"layers/{name}": shape for name, shape in self.routing_state.items()
        }
        self._places = {path: self._place(path) for path in self.shapes}
        self._check()

    def _state_shapes(self, config):
        """Of the routing state: what the model's selection has, be that the run's or not, and what
        files have beside it.
        """
        of_model = read_config(self.directory)
        state = jax.eval_shape(lambda: initial_routing_state(of_model))
        sizes = {"n": config.experts.n_experts, "d": config.model.d_model}
        found = {
            path.removeprefix("layers/"): (
                config.model.n_layers,
                *(sizes[letter] for letter in axes.split()),
            )
            for path, axes in ROUTING_STATE.items()
            if self._find(path)
        }
        return {name: a.shape for name, a in state.items()} | found

    def _find(self, path):
        """The layout that the files have of a parameter, or None."""
        layouts = self._architecture.tensors.get(path, ())
        return next(
            (tensor for tensor in layouts if tensor.name.format(layer=0, expert=0) in self._files),
            None,
        )

    def _place(self, path):
        layouts = self._architecture.tensors.get(path)
        if not layouts:
            raise UserError(
                f"{self.directory}: a model of model_type {self._model_type!r} has no parameter {path}"
            )
        shape = self.shapes[path]
        return Place.of(
            path, self._find(path) or layouts[0], shape[1:] if is_layered(path) else shape
        )

    def _check(self):
        known = set()
        for path, place in self._places.items():
            dtypes = {}
            for layer in range(self._n_layers) if is_layered(path) else (None,):
                for expert in place.experts:
                    name = place.name(layer, expert)
                    stored = self._stored(name)
                    if stored.shape != place.shape:
                        raise UserError(
                            f"{stored.file}: tensor {name} is {list(stored.shape)}, by config.json {list(place.shape)}"
                        )
                    dtypes.setdefault(stored.dtype, name)
                    known.add(name)
            if len(dtypes) > 1:
                names = " and ".join(f"{name} of {dtype}" for dtype, name in dtypes.items())
                raise UserError(f"{self.directory}: tensors {names} must be of the same type")
        ignored = [
            re.escape(name).replace(r"\{layer\}", r"\d+") for name in self._architecture.ignored
        ]
        extra = [
            name
            for name in sorted(self._files.names() - known)
            if not any(re.fullmatch(i, name) for i in ignored)
        ]
        if extra:
            raise UserError(
                f"{self._files.stored(extra[0]).file}: tensor {extra[0]} is unknown, by config.json the model has no such"
            )

    def _stored(self, name):
        if name not in self._files:
            raise UserError(
                f"{self.directory}: tensor {name} is missing, by config.json the model has it"
            )
        return self._files.stored(name)

    def dtype(self, path) -> np.dtype:
        """The dtype of a parameter's tensors."""
        place = self._places[path]
        return self._files.stored(place.name(0, 0)).dtype

    def layer(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter of one layer whole (None: one that has no layers), in the dtype of the file."""
        shape = self.shapes[path]
        bounds = [(0, size) for size in shape]
        if layer is None:
            return self.piece(path, bounds)
        return self.piece(path, [(layer, layer + 1), *bounds[1:]])[0]

    def piece(self, path: str, bounds: list[tuple[int, int]], dtype=None) -> np.ndarray:
        """The part of a parameter between `bounds`, `(first, end)` an axis.

        Args:
          path: of the parameter.
          bounds: of every axis, that of layers first.
          dtype: of the result; None: that of the file.

        Raises:
          UserError: a file can't be read.
        """
        place = self._places[path]
        out = np.empty([end - first for first, end in bounds], dtype or self.dtype(path))
        if not is_layered(path):
            self._fill(out, place, bounds, None)
            return out
        (first, end), *bounds = bounds
        for layer in range(first, end):
            self._fill(out[layer - first, ...], place, bounds, layer)  # a view, of a scalar too
        return out

    def _fill(self, out, place, bounds, layer):
        by_letter = dict(zip(place.sizes, bounds, strict=True))
        with self._files.open() as read:
            if not place.of_experts:
                out[...] = place.from_file(
                    read(place.name(layer), place.slices(by_letter)), by_letter
                )
                return
            first, end = by_letter["n"]
            for expert in range(
                first, end
            ):  # one at a time, also where all lie in one tensor, which may be large
                one = by_letter | {"n": (expert, expert + 1)}
                out[expert - first] = place.from_file(
                    read(place.name(layer, expert), place.slices(one)), one
                )


def load_params(directory: Path, config: Config, mesh: Mesh, dtype=None):
    """Reads the parameters of a model, every device's piece by itself.

    The host holds one piece at a time beside what lies on devices: that of one parameter, all
      layers of it, on one device.

    Args:
      directory: with `config.json` and safetensors files.
      config: of the model, such as `read_config` gives it; its mesh is that of `mesh`.
      mesh: where the parameters are to lie, by `sharding.PARAMETER_AXES`.
      dtype: of the parameters; None: that of the files.

    Returns:
      `(params, routing_state)`: the tree of the decoder's parameters, and what its selection has
        beside them, float32 arrays
      `[L, ...]` by name.

    Raises:
      UserError: a file can't be read, or a tensor is missing, unknown, or has another shape or
        dtype than it should.
    """
    reader = ModelReader(directory, config)

    def array(path, a, sharding):
        return _array(reader, parameter_path(path), a.shape, sharding, dtype)

    params = jax.tree_util.tree_map_with_path(
        array, reader.abstract, state_shardings(mesh, reader.abstract)
    )
    state = {
        name: _array(reader, f"layers/{name}", shape, replicated(mesh), jnp.float32)
        for name, shape in reader.routing_state.items()
    }
    return params, state


def _array(reader, path, shape, sharding, dtype):
    """Not by `jax.make_array_from_callback`, which holds the pieces of all devices of this process
    at once.
    """
    devices = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        piece = reader.piece(path, bounds, dtype)
        arrays += jax.block_until_ready([jax.device_put(piece, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
