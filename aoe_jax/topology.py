"""Devices of machines that are not here, to compile for: TPU slices, and GPUs of one node."""

import importlib.util
import os
import re
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import topologies

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.hardware import CHIPS


def topology_devices(topology, n_slices=1):
    """Devices to compile for. This process runs its own programs on CPU from then on.

    Args:
      topology: a generation and a shape, such as "v5e:16x16" or "h100:8".
      n_slices: number of slices, or of nodes.

    Returns:
      `(generation, devices)`.

    Raises:
      UserError: an unknown name or shape, or a compiler that isn't installed.
    """
    generation, _, shape = topology.partition(":")
    known = f"{', '.join(CHIPS)} and a shape, such as v5e:16x16, v5p:4x4x4 or h100:8"
    is_known = generation in CHIPS and re.fullmatch(r"\d+(x\d+)*", shape)
    require_flag(is_known, "topology", topology, f"is unknown; name one of {known}")
    jax.config.update("jax_platforms", "cpu")  # devices that are here may be busy
    target = Path(__file__).parent / f"{generation}.txtpb"  # of a GPU, as XLA describes it
    if target.exists():
        count = f"takes the number of GPUs of a node, as {generation}:N"
        require_flag(shape.isdecimal() and int(shape) > 0, "topology", topology, count)
        options = _gpu_options(target.read_text(), f"{n_slices}x1x{shape}")
        hint = "the compiler for GPUs is missing; pip install 'jax[cuda13]'"
    else:
        install = "`make .venv/libtpu`, then PYTHONPATH=.venv/libtpu"
        missing = f"libtpu is missing, the compiler for TPUs; {install}"
        require_flag(importlib.util.find_spec("libtpu"), "topology", topology, missing)
        options = _tpu_options(topology, n_slices)
        hint = "the compiler has no such slice"
    try:
        return generation, topologies.get_topology_desc(**options).devices
    except Exception as e:  # the compilers have their own kinds
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--topology={topology}: {hint}: {reason}") from e


def _tpu_options(topology, n_slices):
    # libtpu would ask a metadata server about this machine, and refuse to run beside another
    # process that compiles or trains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"platform": "tpu", "topology_name": topology}
    if n_slices > 1:
        options["num_slices"] = n_slices
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    return options


def _gpu_options(target, topology):
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level" not in xla_flags:  # autotuning needs the GPU
        os.environ["XLA_FLAGS"] = f"{xla_flags} --xla_gpu_autotune_level=0"
    return {"platform": "cuda", "target_config": target, "topology": topology}


def compiling_for(devices):
    """Within, `jax.devices()` returns these devices: Pallas kernels for GPUs ask the first one for
    its number of cores.
    """
    real = jax.devices

    def patched(backend=None):
        return list(devices) if backend is None else real(backend)

    return mock.patch.object(jax, "devices", patched)
