"""What the timed benchmarks share: interleaved medians, configurations, the machine in words."""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax

from aoe_jax.compare.runs import ALLOCATOR
from aoe_jax.config import Config
from aoe_jax.errors import UserError
from aoe_jax.json_files import write_json
from configs import tiny


def keep_freed_memory():
    """Starts this process again with `ALLOCATOR`, unless GLIBC_TUNABLES is set; call it first.

    Else page faults are measured instead of the program, in the baseline as well. `GLIBC_TUNABLES=
    python -m benchmarks...` measures without.
    """
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, sys.orig_argv)


def medians(functions, repeats):
    """Median seconds of each of `functions`, name -> nullary function of arrays, one call of each
    in turn after a first.
    """
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


def configuration(variant, *changes):
    """A variant of configs/tiny.py with changes, group by group: a `Config`."""
    config = tiny.get_config(variant)
    for change in changes:
        for group, values in change.items():
            config[group].update(values)
    return Config.from_config_dict(config)


def check_models(names, known):
    """UserError, which says what there is, where one of `--models` isn't known."""
    for name in names:
        if name not in known:
            raise UserError(f"--models={name} is unknown; choose of {', '.join(known)}")


def parse_sizes(shape, count, form):
    """The `count` sizes of a shape such as `4096x512`; UserError, which says the `form`, where it
    is none.
    """
    sizes = shape.split("x")
    if len(sizes) != count or not all(size.isdecimal() for size in sizes):
        raise UserError(f"--shapes={shape}: {form}")
    if "0" in (size.lstrip("0") or "0" for size in sizes):
        raise UserError(f"--shapes={shape}: every size must be greater than 0")
    return tuple(int(size) for size in sizes)


def report(figures, json_file):
    """Writes the figures (a list of dicts) with the machine to `json_file`, where one is named."""
    if json_file:
        write_json(Path(json_file), {"machine": machine(), "figures": figures})
