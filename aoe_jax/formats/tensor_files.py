"""Reads slices of tensors from safetensors files, and writes tensors to such files."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aoe_jax.errors import UserError
from aoe_jax.storage.files import matching, read_json, write_json
from aoe_jax.storage.retry import patiently

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
_INDEX_BYTES = 2**26  # size limit of an index file; the largest on the hub has 20 MB
_FILE = matching(re.compile(r"[^/\0-\x1f]+\.safetensors"), "the name of a safetensors file")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, slices: Iterable[slice]) -> np.ndarray:
        """Returns `tensor[slices]`, with one slice per axis, in the tensor's dtype. Raises
        `UserError` if the file cannot be read, and `MachineFault` if its disk fails.
        """
        what = f"{self.file}: tensor {self.name} cannot be read"
        try:
            return patiently(what, lambda: self._read(tuple(slices)))
        except (SafetensorError, OSError) as e:
            raise UserError(f"{what} ({e})") from e

    def _read(self, slices):
        # Each read opens the file anew: pages of an open file count as memory of the process.
        with safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.name)[slices]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Returns `{name: Stored}` of a directory's `model.safetensors`, or of the shards of a model.

    Reads only the headers of the files. Raises `UserError` if a file is missing or damaged, or if a
    tensor is not float32, float16 or bfloat16. Raises `MachineFault` if a disk fails.
    """
    if (directory / SINGLE).exists():  # like transformers, do not read an index beside it
        return _read_header(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        wanted = "name a directory with safetensors files"
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}; {wanted}")
    wanted = "the index of a model's safetensors files maps every tensor to its file in weight_map"
    weight_map = read_json(index, wanted, {"weight_map": {str: _FILE}}, _INDEX_BYTES)["weight_map"]
    stored = {}
    for path in sorted({index.with_name(file) for file in weight_map.values()}):
        if not path.exists():
            raise UserError(f"{path} is missing; {INDEX} names it")
        stored |= _read_header(path)
    return stored


def _read_header(path):
    what, stored = f"{path} cannot be read", {}
    try:
        tensors = patiently(what, lambda: _shapes_and_dtypes(path))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{what} ({e}); it is damaged, or no safetensors file") from e
    for name, (shape, dtype) in tensors.items():
        if dtype not in _DTYPES:
            wanted = f"is of type {dtype}; only {', '.join(_DTYPES)} can be read"
            raise UserError(f"{path}: tensor {name} {wanted}")
        stored[name] = Stored(path, name, tuple(shape), np.dtype(_DTYPES[dtype]))
    return stored


def _shapes_and_dtypes(path):
    path.open("rb").close()  # raises a disk's OSError; safetensors would call the file missing
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dict
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]):
    """Writes named tensors to one file, or to shards and an index; needs memory for one file.

    A shard has at most `SHARD_BYTES`; a larger tensor has a file of its own. Raises `OSError` or
    `SafetensorError` if a file cannot be written.
    """
    names, total = [], 0  # the names of each file's tensors, and all bytes
    for number, shard in enumerate(_shards(tensors)):
        # transformers requires the metadata "format".
        file = directory / f"{number}.partial"
        save_file(shard, file, {"format": "pt"})
        file.chmod(directory.stat().st_mode & 0o666)  # safetensors lets only the owner read it
        total += sum(a.nbytes for a in shard.values())
        names.append(list(shard))
        shard.clear()  # frees memory before the next shard is collected
    if len(names) == 1:
        (directory / "0.partial").rename(directory / SINGLE)
        return
    weight_map = {}
    for number, of_file in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"{number}.partial").rename(directory / file)
        weight_map |= dict.fromkeys(of_file, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors):
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = np.asarray(tensor, order="C")
        size += tensor.nbytes
    yield shard
