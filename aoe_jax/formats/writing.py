"""Writes models as safetensors and `config.json`: as Mixtral where that can say all, else in our
own format.
"""

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

from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.formats.architectures import ARCHITECTURES
from aoe_jax.formats.layout import ROUTING_STATE, Place, is_layered, parameter_path
from aoe_jax.formats.tensor_files import SHARD_BYTES, write_tensors
from aoe_jax.json_files import sync, write_json


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write, which is called `output` once all is written, and is gone if that
    fails.

    A kill leaves it, hidden beside `output`.

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
    """That of this process, which can only be read by setting it."""
    mask = os.umask(0)
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
    """Writes `config.json` and the tensors, layer by layer: memory holds one parameter of one layer
    at a time.

    Args:
      directory: is there.
      values: of `config.json`, such as `configs.to_json` gives them; `model_type` says what tensors
        are called.
      shapes: of every parameter by its path, with the axis of layers.
      parameter: gives the parameter of a path and layer (None: of one that has no layers), whole.
        Those of a layer and dtype are asked for together, in the order of `shapes`.
      dtypes: of every parameter by its path.
      shard_bytes: of a file at most.

    Raises:
      OSError: it can't be written.
    """
    layouts = ARCHITECTURES[values["model_type"]].tensors
    places = {
        path: Place.of(path, layouts[path][0], shape[1:] if is_layered(path) else shape)
        for path, shape in shapes.items()
    }
    n_layers = next(shape[0] for path, shape in shapes.items() if is_layered(path))
    order = []
    for dtype in sorted(
        set(dtypes.values()), key=lambda dtype: -dtype.itemsize
    ):  # the widest first, so that all align
        paths = [path for path in places if dtypes[path] == dtype]
        order += [(path, None) for path in paths if not is_layered(path)]
        order += [(path, layer) for layer in range(n_layers) for path in paths if is_layered(path)]
    described = [
        (places[path].name(layer, expert), places[path].shape, dtypes[path])
        for path, layer in order
        for expert in places[path].experts
    ]
    write_json(directory / "config.json", {**values, "torch_dtype": dtypes["embed/embedding"].name})
    write_tensors(directory, described, _tensors(order, places, parameter), shard_bytes)


def _tensors(order, places, parameter):
    for path, layer in order:
        whole, place = parameter(path, layer), places[path]
        for expert in place.experts:
            yield place.to_file(whole if expert is None else whole[expert])


def write_arrays(
    directory: Path, values: dict, params: dict, routing_state: dict, dtype: str | None
):
    """Writes a model that lies on devices, as `write_model` does; parameters are cast there (None:
    not at all).
    """
    arrays = {parameter_path(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}
    arrays |= {f"layers/{name}": a for name, a in routing_state.items()}
    dtypes = {
        path: jnp.dtype("float32" if path in ROUTING_STATE else dtype or a.dtype)
        for path, a in arrays.items()
    }

    def parameter(path, layer):
        return jax.device_get(_part(arrays[path], layer, dtypes[path]))

    shapes = {path: a.shape for path, a in arrays.items()}
    write_model(directory, values, shapes, parameter, dtypes)


@partial(jax.jit, static_argnums=2)
def _part(a, layer, dtype):
    return (a if layer is None else jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)).astype(
        dtype
    )
