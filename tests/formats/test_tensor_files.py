"""Files of tensors are read here and by the library of the format; shards have a maximum size."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from aoe_jax.formats import tensor_files
from aoe_jax.formats.tensor_files import stored_tensors, write_tensors

RANDOM = np.random.default_rng(0)
TENSORS = {
    "bias": RANDOM.normal(size=3).astype(np.float32),
    "scalar": np.float32(2.5).reshape(()),
    "ä/b": RANDOM.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),  # an odd number of odd width
    "half": RANDOM.normal(size=(2, 3, 4)).astype(np.float16),
    "turned": RANDOM.normal(size=(4, 6)).astype(ml_dtypes.bfloat16).T,
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def read_as_written(directory, tensors):
    stored = stored_tensors(directory)
    assert stored.keys() == tensors.keys()
    for name, a in tensors.items():
        assert (stored[name].shape, stored[name].dtype) == (a.shape, a.dtype)
        assert same(stored[name].read([slice(None)] * a.ndim), a)
    return stored


def test_one_file(tmp_path):
    tmp_path.chmod(0o775)
    write_tensors(tmp_path, iter(TENSORS.items()))
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o664
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], a) for name, a in TENSORS.items())
    stored = read_as_written(tmp_path, TENSORS)
    part = stored["half"].read([slice(1, 2), slice(0, 3), slice(1, 3)])
    assert same(part, TENSORS["half"][1:2, :, 1:3])


def test_shards(tmp_path, monkeypatch):
    tensors = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(7)}
    tensors["large"] = np.ones((50, 50), np.float32)
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 900)
    write_tensors(tmp_path, iter(tensors.items()))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1, 1]
    assert files[0].name == "model-00001-of-00005.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert index["weight_map"]["large"] == files[-1].name
    read_as_written(tmp_path, tensors)
