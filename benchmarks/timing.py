"""Shared by the timed benchmarks: interleaved medians, configurations, the machine in words."""

import os
import statistics
import sys
import time
from pathlib import Path

import jax

from aoe_jax.compare.jobs import ALLOCATOR
from aoe_jax.config.run import Config, update_groups
from aoe_jax.errors import UserError
from aoe_jax.hardware import machine
from aoe_jax.json_files import write_json
from configs import tiny


def keep_freed_memory():
    """Starts this process again with `ALLOCATOR`, unless GLIBC_TUNABLES is set; call it first.

    Otherwise page faults would dominate all times, those of the baseline too. `GLIBC_TUNABLES=
    python -m benchmarks...` measures without it.
    """
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, sys.orig_argv)


def medians(functions, repeats):
    """The median seconds of each function, by name, over calls in turn after a first call.

    Args:
      functions: name -> a function without arguments that returns arrays.
      repeats: timed calls of each.
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


def machine_in_words():
    """`machine` as one line."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def configuration(variant, *changes):
    """The `Config` of a variant of configs/tiny.py with changes `{group: {field: value}}`."""
    config = tiny.get_config(variant)
    for change in changes:
        update_groups(config, change)
    return Config.from_config_dict(config)


def check_models(names, known):
    """Refuses names of `--models` that are not known.

    Raises:
      UserError: names one that is not, and those that are.
    """
    for name in names:
        if name not in known:
            raise UserError(f"--models={name} is unknown; choose from {', '.join(known)}")


def parse_shapes(shapes, form):
    """Shapes of four sizes, such as `4096x512x1024x8`, as tuples.

    Raises:
      UserError: a shape is not of this `form`, words that say what the sizes are.
    """
    return [_parse_shape(shape, form) for shape in shapes]


def _parse_shape(shape, form):
    sizes = shape.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        raise UserError(f"--shapes={shape}: {form}")
    if not all(map(int, sizes)):
        raise UserError(f"--shapes={shape}: every size must be greater than 0")
    return tuple(map(int, sizes))


def report(figures, json_file):
    """Writes the figures, a list of dicts, and the machine to `json_file`, if there is one."""
    if json_file:
        write_json(Path(json_file), {"machine": machine(), "figures": figures})
