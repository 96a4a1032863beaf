"""Peaks of chips by the names of their devices in JAX."""

import jax
import pytest

from aoe_jax.errors import UserError
from aoe_jax.planning.hardware import CHIPS, slice_shape, topology_devices
from aoe_jax.training.devices import count_chips, peak_flops_per_device


@pytest.mark.slow  # needs the compiler for TPUs
@pytest.mark.parametrize(
    ("topology", "n_devices", "n_chips"),
    [
        ("v4:2x2x1", 4, 4),
        ("v5e:2x2", 4, 4),
        ("v5p:2x2x1", 4, 4),
        ("v6e:2x2", 4, 4),
        ("tpu7x:2x2x1", 8, 4),
    ],
)
def test_every_tpu_by_the_name_its_compiler_gives_it(topology, n_devices, n_chips):
    """A v7x chip shows as two devices, which have half of its peak each."""
    generation, devices = topology_devices(topology)
    assert (len(devices), count_chips(devices)) == (n_devices, n_chips)
    assert peak_flops_per_device(devices) == CHIPS[generation].flops * n_chips / n_devices
    shape = topology.partition(":")[2]
    assert slice_shape(devices)[: shape.count("x") + 1] == tuple(map(int, shape.split("x")))


@pytest.mark.parametrize("shape", ["", "x", "٣", "9" * 5000])
def test_shapes_that_are_none(shape):
    with pytest.raises(UserError, match=f"--topology=h100:{shape}: is unknown"):
        topology_devices(f"h100:{shape}")


def test_unknown_devices_have_no_peak():
    assert peak_flops_per_device(jax.devices()) is None
    assert count_chips(jax.devices()) == 8
    assert slice_shape(jax.devices()) == ()


@pytest.mark.parametrize(
    ("generation", "shape", "n_chips", "n_links"),
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
    ],
)
def test_a_group_has_the_links_of_the_dimensions_that_it_spans(generation, shape, n_chips, n_links):
    chip = CHIPS[generation]
    share = chip.group_bandwidth(shape, n_chips) / chip.link_bandwidth
    assert share == pytest.approx(n_links / chip.n_links)


@pytest.mark.parametrize(("n_devices", "n_links"), [(32, 4), (16, 3), (8, 2), (2, 6)])
def test_devices_of_a_chip_share_its_links(n_devices, n_links):
    device = CHIPS["tpu7x"].part(1 / 2)
    want = CHIPS["tpu7x"].link_bandwidth / 2 * n_links / 6
    assert device.group_bandwidth((2, 2, 4), n_devices) == pytest.approx(want)
