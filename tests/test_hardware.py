"""Peaks of chips by the names of their devices in JAX."""

import jax
import pytest

from aoe_jax.hardware import CHIPS, count_chips, peak_flops_per_device
from aoe_jax.topology import topology_devices


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


def test_unknown_devices_have_no_peak():
    assert peak_flops_per_device(jax.devices()) is None
    assert count_chips(jax.devices()) == 8
