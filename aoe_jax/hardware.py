"""Accelerators by name: public peak figures, for bounds and utilisation.

Sources: cloud.google.com/tpu/docs (system architecture pages of v4, v5e, v5p, v6e and Ironwood: peak compute, HBM, and
inter-chip bandwidth, of which one direction counts here); nvidia.com (H100 SXM data sheet, dense, NVLink 4). The
bandwidth between slices is that of a chip's share of its host's network card in the Google Cloud machine types.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip; a v4 or v7x chip may show as two devices, which share it."""

    flops: float  # per second, bfloat16, dense
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second into a chip, all links to other chips of its slice (or node) together
    slice_bandwidth: float  # bytes per second into a chip from other slices (or nodes)


CHIPS = {
    "v4": Chip(275e12, 32e9, 1.23e12, 300e9, 3.1e9),
    "v5e": Chip(197e12, 16e9, 0.82e12, 200e9, 3.1e9),
    "v5p": Chip(459e12, 95e9, 2.77e12, 600e9, 6.2e9),
    "v6e": Chip(918e12, 32e9, 1.64e12, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12, 192e9, 7.38e12, 600e9, 12.5e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, 50e9),
}
