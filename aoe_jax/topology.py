"""Devices of machines that needn't be here, for compiling ahead of time: TPU slices, and GPUs of
one node.
"""

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
    """`(generation, devices)` of machines that needn't be here. What this process runs itself, it
    runs on CPU from then on.

    Raises:
      UserError: an unknown name or shape, or a compiler that isn't installed.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology={topology} is unknown; name one of {', '.join(CHIPS)} and a shape, such as v5e:16x16, v5p:4x4x4 "
            "or h100:8"
        )
    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing runs: devices that are here, and may be busy, are left alone
    if generation == "h100":
        return generation, _gpu_devices(int(shape) if shape.isdecimal() else 0, n_slices)
    if importlib.util.find_spec("libtpu") is None:
        wanted = "`make .venv/libtpu`, then PYTHONPATH=.venv/libtpu"
        raise UserError(
            f"--topology={topology}: libtpu is missing, the compiler for TPUs; {wanted}"
        )
    os.environ.setdefault(
        "TPU_SKIP_MDS_QUERY", "1"
    )  # else libtpu asks a metadata server which machine this is
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # other processes may compile, or train, too
    options = {"num_slices": n_slices} if n_slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the real machine
    try:
        return generation, topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except Exception as e:  # of the compiler, a kind of its own
        raise UserError(
            f"--topology={topology}: the compiler has no such slice: {' '.join(str(e).split())[:200]}"
        ) from e


@contextlib.contextmanager
def compiling_for(devices):
    """While it lasts, `jax.devices()` names devices of a topology: Pallas kernels for GPUs ask the
    first for its cores.
    """
    real = jax.devices
    with mock.patch.object(
        jax, "devices", lambda backend=None: list(devices) if backend is None else real(backend)
    ):
        yield


def _gpu_devices(n, n_nodes):
    if n < 1:
        raise UserError("--topology=h100:N takes the number of GPUs of a node")
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level" not in xla_flags:
        os.environ["XLA_FLAGS"] = (
            f"{xla_flags} --xla_gpu_autotune_level=0"  # autotuning would need the GPU
        )
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    try:
        topology = f"{n_nodes}x1x{n}"
        return topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=topology
        ).devices
    except Exception as e:
        raise UserError(
            f"--topology=h100:{n}: the compiler for GPUs is missing; pip install 'jax[cuda13]' "
            f"({' '.join(str(e).split())[:120]})"
        ) from e
