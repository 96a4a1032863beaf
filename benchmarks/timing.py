"""Functions that benchmarks share, for timing, configurations, flags and machine descriptions."""

import functools
import os
import statistics
import sys
import time

import jax
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.jobs import ALLOCATOR
from aoe_jax.config.checks import choose, require_flag
from aoe_jax.config.run import Config
from aoe_jax.planning.hardware import machine
from aoe_jax.storage.config_files import update_groups
from aoe_jax.storage.files import write_json
from configs import tiny

flags.disclaim_key_flags()  # functions below define flags for the module that calls them


def compiled(function, *args):
    """Returns the compiled program for these arguments, and a function that calls it with them."""
    program = jax.jit(function).lower(*args).compile()
    return program, lambda: program(*args)


def times(functions, repeats):
    """Calls the functions in turn and without arguments: once as a warm-up, then `repeats` times.
    Returns `{name: [seconds]}` without the warm-up.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def medians(functions, repeats):
    """Returns `{name: median seconds}` of the calls that `times` makes."""
    return {name: statistics.median(found) for name, found in times(functions, repeats).items()}


def machine_in_words():
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def configuration(kind, *changes):
    """Returns configs/tiny.py:published with another `experts.kind`, and with changes `{group:
    {field: value}}`.
    """
    config = tiny.get_config("published")
    config.experts.kind = kind
    if kind == "dense":
        config.balance.aux_weight = 0.0
    for change in changes:
        update_groups(config, change)
    return Config.from_config_dict(config)


def check_names(flag, names, known):
    """Raises `UserError` if one of `names`, the value of a flag, is not in `known`."""
    for name in names:
        require_flag(name in known, flag, name, choose(name, known))


def parse_shapes(shapes, form, n_sizes=4):
    """Returns shapes, such as `4096x512x1024x8`, as tuples. Raises `UserError` if a shape does not
    have `n_sizes` sizes; `form` describes them in the message.
    """
    found = []
    for shape in shapes:
        sizes = shape.split("x")
        is_form = len(sizes) == n_sizes and all(size.isdecimal() for size in sizes)
        require_flag(is_form, "shapes", shape, form)
        found.append(tuple(map(int, sizes)))
        require_flag(all(found[-1]), "shapes", shape, "every size must be greater than 0")
    return found


def run_benchmark(main, timed=False):
    """Runs a benchmark as a command with the flag `--json`.

    If `timed`, it restarts this process with the glibc settings `ALLOCATOR`, unless GLIBC_TUNABLES
    is set. Without these settings, the times would include page faults of memory that glibc has
    returned to the system. To measure without them, run `GLIBC_TUNABLES= python -m benchmarks...`.
    """
    if timed and "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, sys.orig_argv)
    flags.DEFINE_string("json", None, "a file for the figures")

    @functools.wraps(main)  # --help shows the docstring of main's module
    def checked():
        cli.file_to_write(flags.FLAGS["json"])  # reports a wrong path now, not after hours
        return main()

    cli.run(checked)


def save(value):
    """Writes a value to the file of `--json`, if there is one."""
    if file := cli.file_to_write(flags.FLAGS["json"]):
        write_json(file, value)


def report(figures):
    """Writes the figures, a list of dicts, and the machine to the file of `--json`."""
    save({"machine": machine(), "figures": figures})
