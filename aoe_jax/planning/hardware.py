"""Provides the published peaks of accelerators. Describes TPU slices and GPU nodes, so that
programs can be compiled for them on a machine without these devices.

Sources: the system architecture pages of v4, v5e, v5p, v6e and Ironwood, cloud.google.com/tpu/docs
(peak compute, HBM, and one direction of the inter-chip bandwidth); the Google Cloud machine types
(bandwidth between slices: a chip's share of its host's network card); the data sheets at nvidia.com
(dense peaks, and one direction of NVLink or, for L4, of PCIe).
"""

import importlib.util
import itertools
import math
import os
import platform
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import topologies

from aoe_jax import sharding
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.training.devices import PEAK_FLOPS, count_chips


@dataclass(frozen=True)
class Chip:
    """Published peaks of a chip. A v4 or tpu7x chip may appear as two devices in JAX."""

    flops: float  # FLOPs per second in bfloat16, without sparsity
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that it receives within its slice (or GPU node)
    slice_bandwidth: float  # bytes per second that it receives from other slices (or nodes)
    clock: float | None = None  # cycles per second of a TPU core, computed from its peak
    n_links: int = 1  # links of a chip; two in each dimension of a TPU slice
    ring: int = 1  # a dimension is a ring if its number of chips is a multiple of this
    devices: float = 1  # JAX devices per chip
    matrix_unit: int = 128  # rows and columns of a TPU's matrix unit
    # Share of `flops` that kernels, and products without cycles, likely reach; not measured yet.
    kernel_share: float = 0.8

    def part(self, share):
        """Returns the peaks of a device that is the fraction `share` of the chip."""
        names = ("flops", "hbm_bytes", "hbm_bandwidth", "link_bandwidth", "slice_bandwidth")
        own = {name: share * getattr(self, name) for name in names}
        return replace(self, devices=self.devices / share, **own)

    def group_bandwidth(self, shape, n_devices):
        """Returns the bytes per second that a device receives in a ring algorithm over its group.

        JAX meshes place a group along whole dimensions of the slice if possible; otherwise the
        placement with the most links is assumed. In a whole dimension that is a ring, a chip has
        two links to its group. In other dimensions one link is counted, because the ends of a
        line have only one. Devices of a chip are assumed to exchange data over all of its links.
        `shape` is the number of chips along each dimension; () means that all links are used.
        """
        ways, n_chips = [], max(1, round(n_devices / self.devices))
        for order in itertools.permutations(shape):
            left, parts = n_chips, []
            for size in order:
                parts.append(math.gcd(size, left))
                left //= parts[-1]
            spans = list(zip(order, parts, strict=True))
            n_links = sum(
                2 if part == size and size % self.ring == 0 else part > 1 for size, part in spans
            )
            ways.append((left == 1, all(part in (1, size) for size, part in spans), n_links))
        fits, _, n_links = max(ways, default=(False, False, 0))
        return self.link_bandwidth * (n_links / self.n_links if fits and n_links else 1)


_Wide, _Gpu = partial(Chip, matrix_unit=256), partial(Chip, kernel_share=0.65)
CHIPS = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], 32e9, 1.23e12, 300e9, 3.1e9, 1.05e9, n_links=6, ring=4),
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 16e9, 0.82e12, 200e9, 3.1e9, 1.5e9, n_links=4, ring=16),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 95e9, 2.77e12, 600e9, 6.2e9, 1.75e9, n_links=6, ring=4),
    "v6e": _Wide(PEAK_FLOPS["TPU v6e"], 32e9, 1.64e12, 400e9, 12.5e9, 1.75e9, n_links=4, ring=16),
    "tpu7x": _Wide(PEAK_FLOPS["TPU7x"], 192e9, 7.38e12, 600e9, 12.5e9, n_links=6, ring=4),
    "a100": _Gpu(PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 80e9, 2.04e12, 300e9, 25e9),
    "l4": _Gpu(PEAK_FLOPS["NVIDIA L4"], 24e9, 0.3e12, 32e9, 1.6e9),
    "h100": _Gpu(PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80e9, 3.35e12, 450e9, 50e9),
    "b200": _Gpu(PEAK_FLOPS["NVIDIA B200"], 180e9, 7.7e12, 900e9, 50e9),
}
_PLUGINS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", *_PLUGINS)  # versions that `machine` lists


def chip_part(generation, devices):
    """Returns the peaks of one device; `generation` is a key of `CHIPS`."""
    return CHIPS[generation].part(count_chips(devices) / len(devices))


def slice_shape(devices):
    """Returns the number of chips along each dimension of a TPU slice; () for other devices."""
    if devices[0].platform != "tpu":
        return ()
    return tuple(max(sizes) + 1 for sizes in zip(*(d.coords for d in devices), strict=True))


def machine():
    """Returns a dict that describes this machine: devices, cores, versions, allocator settings."""
    # Of two copies, Python imports the first on its path.
    installed = {p.name: p.version for p in reversed([*metadata.distributions()])}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: installed[name] for name in _PACKAGES if name in installed},
        "allocator": os.environ.get("GLIBC_TUNABLES") or "default",
    }


def count_parts(devices):
    """The number of TPU slices or GPU nodes in a topology; a slower network joins them."""
    if devices[0].platform == "tpu":
        return sharding.count_slices(devices)
    return len({device.process_index for device in devices})


def topology_devices(topology, n_slices=1):
    """Returns `(generation, devices)` for compilation only; afterwards the process computes on CPU.

    `topology` names a TPU slice, such as "v5e:16x16", the GPUs of a node, such as "h100:8", or GPUs
    and nodes, such as "h100:8x4". Raises `UserError` if the name or the shape is unknown, or the
    compiler is not installed.
    """
    generation, _, shape = topology.partition(":")
    known = f"{', '.join(CHIPS)} and a shape, such as v5e:16x16, v5p:4x4x4 or h100:8"
    is_known = generation in CHIPS and re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", shape)
    require_flag(is_known, "topology", topology, f"is unknown; name one of {known}")
    jax.config.update("jax_platforms", "cpu")  # leaves the devices to other processes
    target = Path(__file__).parent / f"{generation}.txtpb"  # description of a GPU for XLA
    if target.exists():
        counts = [int(n) for n in shape.split("x")]
        wanted = f"takes GPUs of a node and nodes, as {generation}:8 or {generation}:8x4"
        require_flag(len(counts) <= 2, "topology", topology, wanted)
        require_flag(
            n_slices == 1, "slices", n_slices, f"is for TPUs; --topology={topology} {wanted}"
        )
        gpus, nodes = (*counts, 1)[:2]
        options = _gpu_options(target.read_text(), f"{nodes}x1x{gpus}")
        hint = "the compiler for GPUs is missing; pip install 'jax[cuda13]'"
    else:
        install = "`make .venv/libtpu`, then PYTHONPATH=.venv/libtpu"
        missing = f"libtpu is missing, the compiler for TPUs; {install}"
        require_flag(importlib.util.find_spec("libtpu"), "topology", topology, missing)
        options = _tpu_options(topology, n_slices)
        hint = "the compiler has no such slice; shapes are AxB, for v4, v5p and tpu7x AxBxC"
    try:
        return generation, topologies.get_topology_desc(**options).devices
    except Exception as e:  # the compilers raise their own types
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--topology={topology}: {hint}: {reason}") from e


def _tpu_options(topology, n_slices):
    # By default libtpu queries a metadata server, and only one process at a time may load it. It
    # complains on stderr if this machine has no accelerator type and no name.
    defaults = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    defaults |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    options = {"platform": "tpu", "topology_name": topology}
    if n_slices > 1:
        options["num_slices"] = n_slices
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip
    return options


def _gpu_options(target, topology):
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level" not in xla_flags:  # autotuning needs the GPU
        os.environ["XLA_FLAGS"] = f"{xla_flags} --xla_gpu_autotune_level=0"
    return {"platform": "cuda", "target_config": target, "topology": topology}


def compiling_for(devices):
    """Returns a context in which `jax.devices()` returns these devices.

    It is needed because Pallas kernels for GPUs read the number of cores from the first device.
    """
    real = jax.devices
    return mock.patch.object(jax, "devices", lambda name=None: real(name) if name else [*devices])
