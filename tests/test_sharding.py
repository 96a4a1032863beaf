"""Rules that map logical axes to the mesh, and the devices of each row of a batch."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numpy.testing import assert_array_equal

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch, spec_of
from aoe_jax.storage.config_files import default_config
from tests.arrays import Device


def configuration(**mesh):
    return dataclasses.replace(Config.from_config_dict(default_config()), mesh=MeshConfig(**mesh))


def test_specs():
    assert spec_of("experts", "embed", "mlp") == PartitionSpec("expert", "fsdp", "tensor")
    assert spec_of("batch", None) == PartitionSpec(("data", "fsdp", "expert"), None)
    with pytest.raises(KeyError, match="width"):
        spec_of("width")


def test_the_rest_of_the_devices():
    assert fill_mesh(configuration(fsdp=2), 8).mesh.data == 4
    assert fill_mesh(configuration(), 1).mesh == MeshConfig(data=1)
    with pytest.raises(UserError, match="must be the number of devices, 8"):
        fill_mesh(configuration(data=2, fsdp=2), 8)
    with pytest.raises(UserError, match=r"train\.batch_size=16"):
        fill_mesh(configuration(), 32)


def test_slices_lie_along_data():
    of_cpu = {"platform": "cpu", "device_kind": "cpu", "process_index": 0}
    devices = [Device(id=n, slice_index=n % 2, **of_cpu) for n in range(8)]
    mesh = make_mesh(configuration(data=4, fsdp=2), devices)
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"mesh\.data=1: must be a multiple of the 2 slices"):
        make_mesh(configuration(data=1, fsdp=2, expert=4), devices)


@pytest.mark.parametrize("n_rows", [None, 8])
def test_a_batch_lies_as_it_was_read(n_rows):
    mesh = make_mesh(configuration(data=2, fsdp=2, tensor=2), jax.devices())
    tokens = np.arange(8 * 3).reshape(8, 3)
    got = put_batch(batch_sharding(mesh), {"inputs": tokens}, n_rows)["inputs"]
    assert_array_equal(got, tokens)
    assert {shard.data.shape for shard in got.addressable_shards} == {(2, 3)}
