"""Loads a model's configuration, and its parameters from safetensors directly onto a mesh."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from aoe_jax.config.checks import differences
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import BalanceConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.errors import UserError, naming, shown
from aoe_jax.formats.architectures import find_layouts
from aoe_jax.formats.configs import computed_fields, from_json, refuse_code
from aoe_jax.formats.tensor_files import stored_tensors
from aoe_jax.model.declared import state_shardings
from aoe_jax.model.decoder import initial_params
from aoe_jax.moe.routing import state_shapes
from aoe_jax.sharding import replicated
from aoe_jax.storage.files import COUNT, or_none, read_json
from aoe_jax.storage.retry import patiently

log = logging.getLogger(__name__)

RUN_FILE = "aoe_jax.json"  # in exported models: {"step", "config"} of the run
_RUN = {"step": or_none(COUNT), "config": {}}
_WANTED = "name a directory with a model's config.json and safetensors files"
_WITHOUT = "remove the file to load the model without it"


def is_model(directory: Path) -> bool:
    """Whether a directory has a model, not a run: only a model's config.json has a `model_type`."""
    path = directory / "config.json"
    is_there = patiently(f"{path} cannot be read", path.exists)
    return is_there and "model_type" in read_json(path, _WANTED)


def is_of_run(directory: Path) -> bool:
    """Whether a directory has a run, or a model that was exported from a run."""
    return not is_model(directory) or (directory / RUN_FILE).exists()


def read_config(directory: Path) -> Config:
    """Returns the configuration of a model in a directory.

    If `aoe_jax.export` wrote the model, this is the configuration of the run, with the defaults of
    `data.cache`, `train` and `mesh`. If the run's micro-batches are smaller than the default batch,
    `train.batch_size` is their size. For other models, `model`, `experts` and `routing` are read
    from `config.json`, and other groups are set by `from_json`; `model.dtype` is bfloat16 if the
    embedding table is bfloat16, else float32. `data.tokenizer` is always the tokenizer in the
    directory. Raises `UserError` if a file cannot be read, or if the architecture is unknown or
    needs something that is not implemented here.
    """
    path = directory / "config.json"
    values = read_json(path, _WANTED)
    with naming(path):
        config = from_json(values)
    table = stored_tensors(directory).get("model.embed_tokens.weight")
    if table is not None and table.dtype.name == "bfloat16":
        model = dataclasses.replace(config.model, dtype="bfloat16")
        config = dataclasses.replace(config, model=model)
    if (directory / RUN_FILE).exists():
        config = _config_of_run(directory / RUN_FILE, config)
    tokenizer = saved_tokenizer(directory)
    # A configuration from an untrusted author may name any path, so its tokenizer and cache are not
    # used. Its paths of corpora are used in messages only (`evaluation.models.corpus_of`).
    own = {"tokenizer": str(tokenizer) if tokenizer.exists() else None, "cache": DataConfig.cache}
    data = dataclasses.replace(config.data, **own)
    # The batch size is at most the default, because that of the run may need many devices.
    rows = config.train.batch_size // config.train.accumulate
    train = TrainConfig(batch_size=min(rows, TrainConfig.batch_size))
    groups = {"mesh": MeshConfig(), "checkpoint": CheckpointConfig()}
    return dataclasses.replace(config, data=data, train=train, **groups)


def _config_of_run(path, config):
    groups = read_json(path, _WITHOUT, _RUN)["config"]
    with naming(path):
        refuse_code(groups.get("routing", {}))
        of_run = Config.from_stored(groups)
    for text in differences(computed_fields(of_run), computed_fields(config)).values():
        raise UserError(f"{path}: config.{text} in config.json; they must agree")
    return of_run


def read_step(directory: Path) -> int | None:
    """Returns the step of the run from which a model was exported, or None."""
    path = directory / RUN_FILE
    return read_json(path, _WITHOUT, _RUN).get("step") if path.exists() else None


def read_begin_token(directory: Path, vocab_size: int) -> int | None:
    """Returns the token that begins every text, or None. Raises `UserError` if it is invalid."""
    path = directory / "config.json"
    token = read_json(path, _WANTED).get("bos_token_id")
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        wanted = f"must be the number of one of {vocab_size} tokens, or null"
        raise UserError(f"{path}: bos_token_id={shown(token)}: {wanted}")
    return token


def read_end_tokens(directory: Path) -> list[int]:
    """Returns the tokens that end a generated text, from `generation_config.json` or, if it has
    none, from `config.json`. Raises `UserError` if they are not token numbers.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        found = read_json(path, _WANTED).get("eos_token_id") if path.exists() else None
        if found is not None:
            tokens = found if isinstance(found, list) else [found]
            if not all(map(COUNT.holds, tokens)):
                wanted = "must be the number of a token, a list of them, or null"
                raise UserError(f"{path}: eos_token_id={shown(found)}: {wanted}")
            return tokens
    return []


def parameter_shapes(config: Config):
    """Returns `{path: ShapeDtypeStruct}` of all parameters; those of layers are `[L, ...]`."""
    return flatten_dict(jax.eval_shape(lambda: initial_params(config, 0)), sep="/")


class ModelReader:
    """Reads parts of the parameters of a model in a directory.

    `parameters` maps paths to shapes, and `routing_state` maps names of routing states to shapes.
    """

    def __init__(self, directory: Path, config: Config):
        """Checks the names, shapes and dtypes of all tensors without reading them. Raises
        `UserError` if a tensor is wrong or missing; also raises what `stored_tensors` raises.
        """
        self._directory, self._stored = directory, stored_tensors(directory)
        self.parameters, own = parameter_shapes(config), read_config(directory)
        n_dense, n_layers = config.model.n_dense_layers, config.model.n_layers
        has_bias = f"model.layers.{n_dense}.mlp.selection_bias" in self._stored
        balance = BalanceConfig(bias_rate=1.0) if has_bias else own.balance
        state = state_shapes(own.routing, own.experts, balance, own.model.d_model)
        self.routing_state = {
            name: jax.ShapeDtypeStruct((n_layers, *a.shape), a.dtype) for name, a in state.items()
        }
        values = read_json(directory / "config.json", _WANTED)
        shapes = self.parameters | {f"layers/{name}": a for name, a in self.routing_state.items()}
        self._layouts = find_layouts(values["model_type"], shapes, self._stored)
        # If the embeddings are tied, an output table in the files is ignored, as in transformers.
        known = {"lm_head.weight"} if config.model.tie_embeddings else set()
        if values.get("num_nextn_predict_layers"):  # the prediction layer follows the others
            last = f"model.layers.{n_dense + n_layers}."
            known |= {name for name in self._stored if name.startswith(last)}
            log.info("left out: the layer of multi-token prediction, %s", last.rstrip("."))
        self._check_tensors(known)

    def _check_tensors(self, known):
        for layout in self._layouts.values():
            dtypes = {}
            for name, _ in layout.tensors(layout.whole):
                if name not in self._stored:
                    wanted = f"tensor {name} is missing; a model of this config.json has it"
                    raise UserError(f"{self._directory}: {wanted}")
                stored = self._stored[name]
                if stored.shape != layout.shape:
                    shapes = f"{list(stored.shape)}, by config.json {list(layout.shape)}"
                    raise UserError(f"{stored.file}: tensor {name} is {shapes}")
                dtypes.setdefault(stored.dtype, name)
                known.add(name)
            if len(dtypes) > 1:
                names = " and ".join(f"{name} of {dtype}" for dtype, name in dtypes.items())
                raise UserError(f"{self._directory}: tensors {names} must be of the same type")
        for name in sorted(self._stored.keys() - known):
            if not name.endswith(".rotary_emb.inv_freq"):  # old files contain it; nothing uses it
                wanted = f"tensor {name} is unknown; a model of this config.json has no such tensor"
                raise UserError(f"{self._stored[name].file}: {wanted}")

    def piece(self, path: str, index: Sequence[slice], dtype=None) -> np.ndarray:
        """Returns `parameter[index]`, with one slice per axis, in `dtype` or the file's dtype.
        Raises `UserError` if a file cannot be read.
        """
        layout = self._layouts[path]
        bounds = {
            axis: part.indices(size)[:2]
            for (axis, (_, size)), part in zip(layout.whole.items(), index, strict=True)
        }
        shape = [end - first for first, end in bounds.values()]
        out = np.empty(shape, dtype or self._stored[layout.first].dtype)
        for name, place in layout.tensors(bounds):
            out[place] = layout.read(self._stored[name], bounds)
        return out


def load_params(directory: Path, config: Config, mesh: Mesh, dtype=None):
    """Returns `(params, routing_state)` of a decoder; the state is float32 `[L, ...]` by name.

    Host memory contains one parameter (of all layers) at a time, and only the host's shards of it.
    `config` is the model's configuration with the axes of `mesh`. The parameters are in `dtype`;
    None means the dtype of the files. Raises `UserError` if a tensor is wrong or cannot be read.
    """
    reader = ModelReader(directory, config)

    def array(path, a, sharding, dtype):
        return jax.block_until_ready(
            jax.make_array_from_callback(
                a.shape, sharding, lambda index: reader.piece(path, index, dtype)
            )
        )

    tree = unflatten_dict(reader.parameters, sep="/")
    shardings = flatten_dict(state_shardings(mesh, tree), sep="/")
    params = {path: array(path, a, shardings[path], dtype) for path, a in reader.parameters.items()}
    state = {
        name: array(f"layers/{name}", a, replicated(mesh), jnp.float32)
        for name, a in reader.routing_state.items()
    }
    return unflatten_dict(params, sep="/"), state
