"""Shared by the benchmarks: interleaved medians, configurations, flags, the machine in words."""

import os
import statistics
import sys
import time
from pathlib import Path

import jax

from aoe_jax import cli
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


def compiled(function, *args):
    """The compiled program for these arguments, and a function that calls it with them."""
    program = jax.jit(function).lower(*args).compile()
    return program, lambda: program(*args)


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


def torch_packages():
    """The modules torch, on one thread, and transformers, and their versions in words.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise UserError(f"{e.name} is missing; pip install torch transformers") from e
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return torch, transformers, versions


def new_workdir(flag):
    """The path of the flag `--workdir`.

    Raises:
      UserError: the flag is missing, or the path exists.
    """
    root = Path(cli.required(flag)).absolute()
    if root.exists():
        raise UserError(f"--workdir={root} exists already; name a new directory")
    return root


def check_names(flag, names, known):
    """Refuses names in the value of a flag that are not known.

    Raises:
      UserError: names one that is not, and those that are.
    """
    for name in names:
        if name not in known:
            raise UserError(f"--{flag}={name} is unknown; choose of {', '.join(known)}")


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
