"""Writes models as safetensors and `config.json`."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.formats.architectures import ARCHITECTURES, ROUTING_STATE
from aoe_jax.formats.layout import Layout, is_layered, parameter_path
from aoe_jax.formats.reading import RUN_FILE
from aoe_jax.formats.tensor_files import SHARD_BYTES, write_tensors
from aoe_jax.json_files import sync, write_json


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write, renamed to `output` at the end, and removed after an exception.

    A killed process leaves it, hidden beside `output`.

    Raises:
      UserError: `output` exists, or can't be written.
    """
    if output.exists():
        raise UserError(f"--output={output} exists already; name a new directory")
    parent, partial = output.absolute().parent, None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial.", dir=parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, output)
        sync(partial.parent)
    except OSError as e:
        reason = "no space left on the disk" if is_disk_full(e) else e.strerror
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(f"--output={output} can't be written: {reason}{where}") from e
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask():
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_model(
    directory: Path,
    values: dict,
    shapes: dict[str, tuple[int, ...]],
    parameter: Callable[[str, int | None], np.ndarray],
    dtypes: dict[str, np.dtype],
    shard_bytes: int = SHARD_BYTES,
):
    """Writes `config.json` and the tensors; memory holds one parameter of one layer at a time.

    Args:
      directory: exists.
      values: of `config.json`, such as `configs.to_json` returns them; their `model_type` decides
        the names of the tensors.
      shapes: of every parameter by its path, with the axis of layers.
      parameter: `(path, layer)` -> the whole parameter of a layer; layer is None for a parameter
        outside the layers. The calls for a layer and dtype come together, in the order of `shapes`.
      dtypes: of every parameter by its path.
      shard_bytes: the largest size of a file.

    Raises:
      OSError: a file can't be written.
    """
    tables = ARCHITECTURES[values["model_type"]].tensors
    layouts = {
        path: Layout(tables[path][0], shape[1:] if is_layered(path) else shape)
        for path, shape in shapes.items()
    }
    n_layers = next(shape[0] for path, shape in shapes.items() if is_layered(path))
    order = []
    for dtype in sorted(set(dtypes.values()), key=lambda dtype: -dtype.itemsize):
        paths = [path for path in layouts if dtypes[path] == dtype]
        order += [(path, None) for path in paths if not is_layered(path)]
        order += [(path, layer) for layer in range(n_layers) for path in paths if is_layered(path)]
    described = [
        (layouts[path].name(layer, expert), layouts[path].shape, dtypes[path])
        for path, layer in order
        for expert in layouts[path].experts
    ]

    def tensors():
        for path, layer in order:
            whole, layout = parameter(path, layer), layouts[path]
            for expert in layout.experts:
                yield layout.to_file(whole if expert is None else whole[expert])

    write_json(directory / "config.json", {**values, "torch_dtype": dtypes["embed/embedding"].name})
    write_tensors(directory, described, tensors(), shard_bytes)


def write_arrays(
    directory: Path, values: dict, params: dict, routing_state: dict, dtype: str | None
):
    """Writes a model from arrays on devices, like `write_model`.

    Args:
      directory: exists.
      values: of `config.json`.
      params: the decoder's parameters.
      routing_state: the state of the selection method, `[L, ...]` by name.
      dtype: of the parameters in the files; None: their own.
    """
    arrays = {parameter_path(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}
    arrays |= {f"layers/{name}": a for name, a in routing_state.items()}
    shapes = {path: a.shape for path, a in arrays.items()}
    dtypes = {
        path: jnp.dtype("float32" if path in ROUTING_STATE else dtype or a.dtype)
        for path, a in arrays.items()
    }

    def parameter(path, layer):
        return jax.device_get(_cast(arrays[path], layer, dtypes[path]))

    write_model(directory, values, shapes, parameter, dtypes)


@partial(jax.jit, static_argnames="dtype")
def _cast(a, layer, dtype):
    whole = a if layer is None else jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
    return whole.astype(dtype)


def write_run(directory: Path, source: Path, step: int | None, config: Config):
    """Writes which run and step a model is from, and which data the run in `source` read."""
    write_json(directory / RUN_FILE, {"step": step, "config": config.to_dict()})
    if (source / "data.json").exists():
        shutil.copyfile(source / "data.json", directory / "data.json")
