"""Finds the peak FLOP/s of chips by the names of their devices in JAX."""

import jax
import pytest

from aoe_jax.errors import UserError
from aoe_jax.planning.hardware import CHIPS, count_parts, slice_shape, topology_devices
from aoe_jax.training.devices import count_chips, peak_flops_per_device
from tests.arrays import Device

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.mark.slow  # needs the compiler for TPUs
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_peaks_of_tpus_by_the_names_of_their_devices(topology):
    """JAX shows a v7x chip as two devices, and each has half of the chip's peak."""
    generation, devices = topology_devices(topology)
    n_devices = 8 if generation == "tpu7x" else 4
    assert (len(devices), count_chips(devices)) == (n_devices, 4)
    assert peak_flops_per_device(devices) == CHIPS[generation].flops * 4 / n_devices
    shape = topology.partition(":")[2]
    assert slice_shape(devices)[: shape.count("x") + 1] == tuple(map(int, shape.split("x")))


def test_invalid_shapes_and_a_missing_compiler(monkeypatch):
    for shape in ("", "x", "٣", "0x4", "9" * 5000):
        with pytest.raises(UserError, match=f"--topology=h100:{shape}: is unknown"):
            topology_devices(f"h100:{shape}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--topology=v5e:2x2: libtpu is missing, the compiler"):
        topology_devices("v5e:2x2")


@pytest.mark.slow
def test_a_slice_that_there_is_not():
    with pytest.raises(UserError, match="--topology=v5e:3x5: the compiler has no such slice"):
        topology_devices("v5e:3x5")


def test_unknown_devices_have_no_peak():
    assert peak_flops_per_device(jax.devices()) is None
    assert count_chips(jax.devices()) == 8
    assert slice_shape(jax.devices()) == ()


def test_parts_of_a_topology():
    """A node of GPUs is a process; JAX numbers the slices of TPUs."""
    gpus = [Device(platform="gpu", process_index=n // 8) for n in range(32)]
    cores = [Device(platform="tpu", process_index=n, slice_index=n // 2) for n in range(4)]
    assert (count_parts(gpus), count_parts(cores)) == (4, 2)
    for topology, n_slices, words in [
        ("h100:8x4x2", 1, "takes GPUs of a node and nodes, as h100:8 or h100:8x4"),
        ("h100:0", 1, "--topology=h100:0: is unknown"),
        ("h100:8", 4, "--slices=4: is for TPUs"),
    ]:
        with pytest.raises(UserError, match=words):
            topology_devices(topology, n_slices)


def test_chips_of_several_slices_have_the_same_coordinates():
    cores = [Device(platform="tpu", coords=(0, 0, 0), slice_index=n // 2) for n in range(4)]
    assert count_chips(cores) == 2


@pytest.mark.parametrize(
    ("generation", "shape", "n_devices", "n_links"),
    [
        ("v5p", (4, 4, 4), 64, 6),
        ("v5p", (4, 4, 4), 16, 4),  # two rings of four
        ("v5p", (4, 4, 8), 8, 2),  # the ring of eight
        ("v5p", (4, 4, 4), 8, 3),  # a ring, and half of another
        ("v5e", (16, 16, 1), 256, 4),
        ("v5e", (16, 16, 1), 16, 2),
        ("v5e", (4, 4, 1), 16, 2),  # lines, not rings
        ("v5e", (4, 4, 1), 4, 1),
        ("v5e", (), 16, 4),
        ("h100", (), 8, 1),
        ("tpu7x", (2, 2, 4), 32, 4),  # two devices of a chip share its links
        ("tpu7x", (2, 2, 4), 16, 3),
        ("tpu7x", (2, 2, 4), 8, 2),
        ("tpu7x", (2, 2, 4), 2, 6),
    ],
)
def test_links_of_a_group_of_devices(generation, shape, n_devices, n_links):
    device = CHIPS[generation].part(1 / 2 if generation == "tpu7x" else 1)
    share = device.group_bandwidth(shape, n_devices) / device.link_bandwidth
    assert share == pytest.approx(n_links / device.n_links)
