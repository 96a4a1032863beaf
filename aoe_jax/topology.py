"""Devices of machines that are not here, to compile for: TPU slices, and GPUs of one node."""

import contextlib
import importlib.util
import os
import re
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import topologies

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
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology={topology} is unknown; name one of {', '.join(CHIPS)} and a shape, such "
            "as v5e:16x16, v5p:4x4x4 or h100:8"
        )
    jax.config.update("jax_platforms", "cpu")  # devices that are here may be busy
    if generation == "h100":
        return generation, _gpu_devices(int(shape) if shape.isdecimal() else 0, n_slices)
    return generation, _tpu_devices(topology, generation, n_slices)


def _tpu_devices(topology, generation, n_slices):
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: libtpu is missing, the compiler for TPUs; "
            "`make .venv/libtpu`, then PYTHONPATH=.venv/libtpu"
        )
    # libtpu would ask a metadata server about this machine, and refuse to run beside another
    # process that compiles or trains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"num_slices": n_slices} if n_slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as e:  # the compiler has its own kind
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--topology={topology}: the compiler has no such slice: {reason}") from e
    return found.devices


def _gpu_devices(n, n_nodes):
    if n < 1:
        raise UserError("--topology=h100:N takes the number of GPUs of a node")
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level" not in xla_flags:  # autotuning needs the GPU
        os.environ["XLA_FLAGS"] = f"{xla_flags} --xla_gpu_autotune_level=0"
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"{n_nodes}x1x{n}"
        )
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(
            f"--topology=h100:{n}: the compiler for GPUs is missing; pip install 'jax[cuda13]' "
            f"({reason})"
        ) from e
    return found.devices


@contextlib.contextmanager
def compiling_for(devices):
    """Within, `jax.devices()` returns these devices: Pallas kernels for GPUs ask the first one for
    its number of cores.
    """
    real = jax.devices

    def patched(backend=None):
        return list(devices) if backend is None else real(backend)

    with mock.patch.object(jax, "devices", patched):
        yield
