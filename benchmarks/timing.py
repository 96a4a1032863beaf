"""What the timed benchmarks share: interleaved medians, the machine in words, an allocator that keeps its memory."""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax

from aoe_jax.training.checkpoint import write_json

# glibc gives large blocks back to the system as soon as they are free, and the page faults of getting them again are then
# measured instead of the program, in the baseline as well. `GLIBC_TUNABLES= python -m benchmarks...` measures without.
ALLOCATOR = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.arena_max": 1,
}


def keep_freed_memory():
    """Starts this process again with `ALLOCATOR`, unless GLIBC_TUNABLES is set; call it first."""
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in ALLOCATOR.items())
        os.execv(sys.executable, sys.orig_argv)


def medians(functions, repeats):
    """Median seconds of each of `functions`, name -> nullary function of arrays, one call of each in turn after a first."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine():
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "allocator": os.environ.get("GLIBC_TUNABLES") or "default",
    }


def report(figures, json_file):
    """Writes the figures (a list of dicts) with the machine to `json_file`, where one is named."""
    if json_file:
        write_json(Path(json_file), {"machine": machine(), "figures": figures})
