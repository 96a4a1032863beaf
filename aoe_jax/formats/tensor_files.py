"""Directories of safetensors files, read slice by slice and written one tensor at a time."""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, sync, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """The tensors of a directory: `model.safetensors`, or the shards that its index names.

    `stored` has the `Stored` of every tensor by its name.
    """

    def __init__(self, directory: Path):
        """Reads the headers of all files, and no tensor.

        Raises:
          UserError: a file is missing, damaged or differs from the index, or a tensor is not
            float32, float16 or bfloat16.
        """
        if (directory / SINGLE).exists():  # transformers too ignores an index beside it
            self.stored = _read_header(directory / SINGLE)
        elif (directory / INDEX).exists():
            self.stored = _read_shards(directory / INDEX)
        else:
            wanted = "name a directory with safetensors files"
            raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}; {wanted}")

    @contextmanager
    def open(self):
        """A context in which tensors are read: `with files.open() as read: read(name, slices)`.

        `read` returns a tensor, or the part that one slice per axis selects, as a numpy array of
        the tensor's dtype. Files are closed at the end: the pages of an open file count as memory
        of the process. `read` raises `UserError` where a file can't be read.
        """
        files = {}
        with ExitStack() as stack:

            def read(name, slices=None):
                path = self.stored[name].file
                try:
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="numpy"))
                    if slices is None:
                        return files[path].get_tensor(name)
                    return files[path].get_slice(name)[tuple(slices)]
                except (SafetensorError, OSError) as e:
                    raise UserError(f"{path}: tensor {name} can't be read ({_reason(e)})") from e

            yield read


def _read_shards(index: Path):
    wanted = "the index of a model's safetensors files maps every tensor to its file in weight_map"
    weight_map = read_json(index, wanted).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} can't be read: it has no weight_map; {wanted}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            what = f"tensor {name} lies in {file!r}, which is no file's name"
            raise UserError(f"{index} can't be read: {what}; {wanted}")
    stored = {}
    for file in sorted(set(weight_map.values())):
        path = index.with_name(file)
        if not path.exists():
            raise UserError(f"{path} is missing; {index.name} names it")
        found = _read_header(path)
        named = {name for name, its_file in weight_map.items() if its_file == file}
        if missing := sorted(named - found.keys()):
            raise UserError(f"{path} has no tensor {missing[0]}, which {index.name} says is there")
        if extra := sorted(found.keys() - named):
            what = f"{extra[0]}, which {index.name} doesn't say is there"
            raise UserError(f"{path} has a tensor {what}")
        stored |= found
    return stored


def _read_header(path: Path):
    stored = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                piece = file.get_slice(name)
                dtype = piece.get_dtype()
                if dtype not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise UserError(
                        f"{path}: tensor {name} is of type {dtype}; only {known} can be read"
                    )
                stored[name] = Stored(path, tuple(piece.get_shape()), _DTYPES[dtype])
    except (SafetensorError, OSError) as e:
        what = "it is no safetensors file, or damaged"
        raise UserError(f"{path} can't be read ({_reason(e)}); {what}") from e
    return stored


def _reason(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_tensors(
    directory: Path,
    described: list[tuple[str, tuple[int, ...], np.dtype]],
    values: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
):
    """Writes tensors to one file, or to shards and their index.

    Memory holds one tensor at a time. The library `safetensors` needs all tensors of a file at
    once; the format is a JSON header, then the numbers.

    Args:
      directory: exists.
      described: name, shape and dtype of every tensor; wider dtypes first, so that all are aligned.
      values: the tensors, in the same order.
      shard_bytes: the largest size of a file; a larger tensor has a file of its own.

    Raises:
      OSError: a file can't be written.
    """
    shards = _shards(described, shard_bytes)
    count, values, weight_map = len(shards), iter(values), {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        with (directory / name).open("wb") as out:
            out.write(_header(shard))
            for tensor, shape, dtype in shard:
                value = np.asarray(next(values), order="C")
                if (value.shape, value.dtype) != (shape, dtype):
                    found = f"{value.dtype}{value.shape}"
                    raise ValueError(f"{tensor} is {found}, not {dtype}{shape}")
                out.write(value.reshape(-1).view(np.uint8).data)
        sync(directory / name)
        weight_map |= {tensor: name for tensor, _, _ in shard}
    if count > 1:
        total = sum(map(_n_bytes, described))
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(described, shard_bytes):
    shards, size = [[]], 0
    for tensor in described:
        if shards[-1] and size + _n_bytes(tensor) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _n_bytes(tensor)
    return shards


def _n_bytes(tensor):
    _, shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _header(shard):
    header = {"__metadata__": {"format": "pt"}}  # transformers asks for the orientation of torch
    begin = 0
    for tensor in shard:
        name, shape, dtype = tensor
        end = begin + _n_bytes(tensor)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
