"""What every arm of a suite would need on machines that aren't here: `python -m
aoe_jax.compare.plan --suite=FILE`.

`--topology=v5e:4x4 [--sizes=NAME,...] [--set=GROUP.FIELD=VALUE] [--json=FILE]`: the training step
of each arm is compiled as by `aoe_jax.plan`, which says how the figures come about, one after the
other; minutes each, on a core. `--set` is that of `aoe_jax.compare`, such as `--set=mesh.fsdp=16`.
Prints a table in Markdown; exit status 3: an arm doesn't fit.
"""

import logging
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.suite import Suite, load_suite
from aoe_jax.errors import UserError
from aoe_jax.json_files import write_json
from aoe_jax.plan import plan
from aoe_jax.sharding import fill_mesh
from aoe_jax.topology import topology_devices

log = logging.getLogger(
    "aoe_jax.compare.plan"
)  # not __name__, which is __main__ on the command line

_SUITE = flags.DEFINE_string(
    "suite", None, "a file with get_suite(), such as configs/compare/paper.py"
)
_SIZES = flags.DEFINE_list("sizes", [], "of the suite; by default all")
_SET = flags.DEFINE_multi_string("set", [], "GROUP.FIELD=VALUE for all runs, such as mesh.fsdp=16")

HEAD = (
    "arm",
    "fits",
    "memory (state), GB",
    "compiled / useful FLOPs",
    "received, GB",
    "step at least",
    "MFU at most",
)


def first_runs(suite: Suite, sizes):
    """The run of the first seed of each arm at some sizes, all of none; UserError where one is
    unknown.
    """
    unknown = [size for size in sizes if size not in suite.sizes]
    if unknown:
        raise UserError(
            f"--sizes={','.join(sizes)}: {unknown[0]} is unknown; choose of {', '.join(suite.sizes)}"
        )
    return [run for run in suite.runs() if run.seed == 0 and (not sizes or run.size in sizes)]


def row(name, figure):
    """The cells of `HEAD`, of what `plan` returns."""
    memory, flops = figure["memory_bytes"], figure["flops"]
    return [
        name,
        "yes" if figure["fits"] else "NO",
        f"{memory['total'] / 1e9:.2f} ({memory['state'] / 1e9:.2f})",
        f"{flops['compiled'] / flops['useful']:.3f}" if flops["compiled"] else "not counted",
        f"{sum(figure['collective_bytes'].values()) / 1e9:.1f}",
        f"{figure['step_seconds']:.3f} s, {figure['bound_by']}",
        f"{figure['mfu_bound']:.2f}",
    ]


def main():
    """Plans, prints, and exits with 3 where an arm doesn't fit."""
    suite = load_suite(Path(cli.required(_SUITE)), _SET.value)
    runs = first_runs(suite, _SIZES.value)
    topology = cli.required(
        flags.FLAGS["topology"]
    )  # defined by aoe_jax.plan, as --slices and --json are
    generation, devices = topology_devices(topology, flags.FLAGS.slices)
    configs = {f"{run.size}: {run.arm}": fill_mesh(run.config, len(devices)) for run in runs}
    figures = {}
    for name, config in configs.items():
        figures[name] = plan(config, generation, devices)
        log.info("%d of %d: %s", len(figures), len(configs), ", ".join(row(name, figures[name])))
        if flags.FLAGS.json:
            write_json(
                Path(flags.FLAGS.json),
                {"topology": topology, "settings": _SET.value, "figures": figures},
            )
    for cells in (
        HEAD,
        ["---", *["---:"] * (len(HEAD) - 1)],
        *(row(*item) for item in figures.items()),
    ):
        print(f"| {' | '.join(cells)} |")
    return 0 if all(figure["fits"] for figure in figures.values()) else 3


if __name__ == "__main__":
    cli.run(main)
