"""Writes models as safetensors and `config.json`, for `aoe_jax` and other programs."""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from tqdm import tqdm

from aoe_jax.errors import MachineFault, UserError
from aoe_jax.formats.architectures import find_layouts
from aoe_jax.formats.tensor_files import write_tensors
from aoe_jax.parameters import STACKS
from aoe_jax.storage.files import sync, write_json
from aoe_jax.storage.paths import Mirror, is_remote
from aoe_jax.storage.retry import is_fault_of_write, patiently, reason

_CLASSES = Path(__file__).with_name("huggingface")  # our classes for transformers


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yields a directory that is renamed to `output` at the end, or removed after an exception.

    After SIGKILL, the hidden directory `.NAME.partial.*` beside `output` remains. If `output` is in
    an object store, the directory is a local temporary one; its files are uploaded at the end,
    `config.json` last. Raises `UserError` if `output` exists or cannot be written, `MachineFault`
    if its disk fails.
    """
    if output.exists() if is_remote(output) else os.path.lexists(output):
        raise UserError(f"--output={output} exists already; name a new directory")
    if is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            mirror = Mirror(Path(folder), output)
            yield Path(folder)
            patiently(f"--output={output} cannot be written", lambda: mirror.upload("config.json"))
        return
    partial = output.absolute().with_name(f".{output.name}.partial.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, output)
        sync(partial.parent)
    except (OSError, SafetensorError) as e:
        where = f" ({e.filename})" if getattr(e, "filename", None) else ""
        kind = MachineFault if is_fault_of_write(e) else UserError
        raise kind(f"--output={output} cannot be written: {reason(e)}{where}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(directory: Path, values: dict, shapes: dict[str, Any], parameter: Callable):
    """Writes `config.json` and tensors; needs memory for one file and one parameter of a layer.

    `values` is the content of `config.json` without the dtype. Its `model_type` decides the names
    of the tensors; if it has an `auto_map`, our classes are copied, too. `shapes` maps every path
    to an array or a `ShapeDtypeStruct`, with the axis of layers. `parameter(path, layer)` must
    return the whole parameter of a layer; `layer` is the number of the layer in its stack, or None
    for a parameter outside the layers. All parameters of a layer are requested together, in the
    order of `shapes`. Raises OSError or SafetensorError if a file cannot be written.
    """
    layouts = find_layouts(values["model_type"], shapes)
    stacks = {}  # name of a stack of layers (None: outside layers) -> paths of its parameters
    for path in shapes:
        first = path.partition("/")[0]
        stacks.setdefault(first if first in STACKS else None, []).append(path)
    parts = [(stacks[None], None)]  # (paths, number of the layer)
    for stack in filter(stacks.get, STACKS):
        parts += [(stacks[stack], layer) for layer in range(shapes[stacks[stack][0]].shape[0])]

    def tensors():
        for paths, layer in tqdm(parts, "writing", unit="layer", delay=5, disable=None):
            for path in paths:
                layout, part = layouts[path], parameter(path, layer)
                bounds = layout.whole
                if layer is not None:
                    bounds, part = bounds | {"L": (layer, layer + 1)}, part[None]
                for name, index in layout.tensors(bounds):
                    yield name, layout.to_file(part[*index, ...])

    dtype = parameter("embed/embedding", None).dtype.name
    write_json(directory / "config.json", values | {"torch_dtype": dtype})
    if "auto_map" in values:
        for file in _CLASSES.glob("*.py"):
            shutil.copyfile(file, directory / file.name)
    write_tensors(directory, tensors())


def parameters_of(params: dict, routing_state=None, dtype: str | None = None):
    """Returns the arguments `(shapes, parameter)` of `write_model`, from arrays on devices.

    `params` is the tree of the decoder's parameters, and `routing_state` maps names to float32
    arrays `[L, ...]`. `dtype` is the dtype of parameters in the files; None keeps that of `params`.
    """
    arrays = flatten_dict(params, sep="/")
    dtypes = {path: dtype or a.dtype for path, a in arrays.items()}
    arrays |= {f"layers/{name}": a for name, a in (routing_state or {}).items()}

    def parameter(path, layer):
        whole = arrays[path] if layer is None else arrays[path][layer]
        return jax.device_get(whole.astype(dtypes.get(path, "float32")))

    return arrays, parameter
