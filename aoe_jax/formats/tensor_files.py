"""Safetensors files: a directory of them is read lazily, slice by slice, and written one tensor at
a time.
"""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
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
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """The tensors of a directory: `model.safetensors`, or the shards that its index names."""

    def __init__(self, directory: Path):
        """Reads the headers of all files, and of the tensors nothing.

        Raises:
          UserError: a file is missing, damaged or not what the index says, or a tensor is of
            another type than float32, float16 and bfloat16.
        """
        self.directory = directory
        index = directory / INDEX
        if (
            directory / SINGLE
        ).exists():  # first, as transformers has it: an index beside it is of an older model
            self._stored = _header(directory / SINGLE)
        elif index.exists():
            self._stored = _of_index(index)
        else:
            raise UserError(
                f"{directory} has neither {SINGLE} nor {INDEX}; name a directory with safetensors files"
            )

    def __contains__(self, name):
        return name in self._stored

    def names(self):
        """The names of all tensors."""
        return self._stored.keys()

    def stored(self, name) -> Stored:
        """Of a tensor that is there."""
        return self._stored[name]

    def open(self):
        """A context in which tensors are read: `with files.open() as read: read(name, slices)`."""
        return _Reader(self._stored)


class _Reader:
    """Opens files when they are wanted, and closes them in the end: pages of an open file count as
    memory of the process.
    """

    def __init__(self, stored):
        self._stored, self._open, self._stack = stored, {}, ExitStack()

    def __enter__(self):
        return self.read

    def __exit__(self, *error):
        self._stack.close()

    def read(self, name, slices=None):
        """A tensor, or the part of it that one slice an axis selects, as a numpy array of its own
        dtype.
        """
        file = self._stored[name].file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="numpy"))
            if slices is None:
                return self._open[file].get_tensor(name)
            return self._open[file].get_slice(name)[tuple(slices)]
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: tensor {name} can't be read ({_reason(e)})") from e


def _of_index(index: Path):
    wanted = "the index of a model's safetensors files maps every tensor to its file in weight_map"
    weight_map = read_json(index, wanted).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} can't be read: it has no weight_map; {wanted}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{index} can't be read: tensor {name} lies in {file!r}, which is no file's name; {wanted}"
            )
    stored = {}
    for file in sorted(set(weight_map.values())):
        path = index.with_name(file)
        if not path.exists():
            raise UserError(f"{path} is missing; {index.name} names it")
        found = _header(path)
        named = {name for name, its in weight_map.items() if its == file}
        if missing := sorted(named - found.keys()):
            raise UserError(f"{path} has no tensor {missing[0]}, which {index.name} says is there")
        if extra := sorted(found.keys() - named):
            raise UserError(
                f"{path} has a tensor {extra[0]}, which {index.name} doesn't say is there"
            )
        stored |= found
    return stored


def _header(path: Path):
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            described = {
                name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in found.items()
            }
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} can't be read ({_reason(e)}); it is no safetensors file, or damaged"
        ) from e
    for name, (dtype, _) in described.items():
        if dtype not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name} is of type {dtype}; only {', '.join(_DTYPES)} can be read"
            )
    return {name: Stored(path, shape, _DTYPES[dtype]) for name, (dtype, shape) in described.items()}


def _reason(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_tensors(
    directory: Path,
    described: list[tuple[str, tuple[int, ...], np.dtype]],
    values: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
):
    """Writes tensors one after the other, so that memory holds no more than one: a file, or shards
    and their index.

    The library writes a file from all of its tensors at once; this is its format, a header and then
    the numbers.

    Args:
      directory: is there.
      described: name, shape and dtype of every tensor; wider dtypes first, so that each lies at a
        multiple of its width.
      values: the tensors, in the same order.
      shard_bytes: of a file at most; one larger tensor has a file of its own.

    Raises:
      OSError: it can't be written.
    """
    shards = _shards(described, shard_bytes)
    count, values, weight_map = len(shards), iter(values), {}
    for number, shard in enumerate(shards, 1):
        file = directory / (
            SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        )
        with file.open("wb") as out:
            out.write(_header_bytes(shard))
            for name, shape, dtype in shard:
                value = np.asarray(next(values), order="C")
                if (value.shape, value.dtype) != (shape, dtype):
                    raise ValueError(f"{name} is {value.dtype}{value.shape}, not {dtype}{shape}")
                out.write(value.reshape(-1).view(np.uint8).data)
        sync(file)
        weight_map |= {name: file.name for name, _, _ in shard}
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


def _header_bytes(shard):
    header, begin = (
        {"__metadata__": {"format": "pt"}},
        0,
    )  # the orientation of torch; transformers asks for it
    for tensor in shard:
        name, shape, dtype = tensor
        end = begin + _n_bytes(tensor)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
