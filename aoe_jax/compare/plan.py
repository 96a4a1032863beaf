"""Plans every arm of a suite for an absent machine.

    python -m aoe_jax.compare.plan --suite=FILE --topology=v5e:4x4 [--sizes=NAME,...]

The training step of each arm is compiled by `aoe_jax.plan`, which explains the figures. That takes
minutes for each arm, on one core. `--set` is the flag of `aoe_jax.compare`, such as
`--set=mesh.fsdp=16`. Prints a table in Markdown; exit status 3 means that an arm does not fit.
"""

import logging

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.statistics import markdown_table
from aoe_jax.compare.suite import Suite, load_suite, one_of
from aoe_jax.config.checks import require_flag
from aoe_jax.planning.hardware import topology_devices
from aoe_jax.planning.plan import plan
from aoe_jax.storage.files import write_json

log = logging.getLogger("aoe_jax.compare.plan")  # __name__ is __main__ on the command line

_SUITE = flags.DEFINE_string(
    "suite", None, "a file with get_suite(), such as configs/compare/paper.py"
)
_SIZES = flags.DEFINE_list("sizes", [], "of the suite; by default all")
_TOPOLOGY = flags.DEFINE_string("topology", None, "GENERATION:SHAPE, such as v5e:16x16 or h100:8")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "a file for the plans")
_SET = flags.DEFINE_multi_string("set", [], "GROUP.FIELD=VALUE for all runs, such as mesh.fsdp=16")


def first_runs(suite: Suite, sizes):
    """Returns the run of the first seed of each arm at some sizes; no sizes means all. Raises
    `UserError` if a size is unknown.
    """
    for size in sizes:
        wanted = f"{size} is unknown; {one_of(suite.sizes)}"
        require_flag(size in suite.sizes, "sizes", ",".join(sizes), wanted)
    return [run for run in suite.runs() if run.seed == 0 and (not sizes or run.size in sizes)]


def row(name, figure):
    memory, flops = figure["memory_bytes"], figure["flops"]
    compiled = f"{flops['compiled'] / flops['useful']:.3f}" if flops["compiled"] else "not counted"
    likely = figure["likely_step_seconds"]
    return {
        "arm": name,
        "fits": "yes" if figure["fits"] else "NO",
        "memory (state), GB": f"{memory['total'] / 1e9:.2f} ({memory['state'] / 1e9:.2f})",
        "compiled / useful FLOPs": compiled,
        "received, GB": f"{sum(figure['collective_bytes'].values()) / 1e9:.1f}",
        "likely step": f"{likely:.3f} s" if likely else "unknown",
        "step at least": f"{figure['step_seconds']:.3f} s, {figure['bound_by']}",
        "MFU at most": f"{figure['mfu_bound']:.2f}",
    }


def main():
    suite = load_suite(cli.path_of(_SUITE), _SET.value)
    runs = first_runs(suite, _SIZES.value)
    topology, file = cli.required(_TOPOLOGY), cli.file_to_write(_JSON)
    generation, devices = topology_devices(topology, _SLICES.value)
    figures, rows = {}, []
    for run in runs:
        name = f"{run.size}: {run.arm}"
        figures[name] = plan(run.config, generation, devices)
        rows.append(row(name, figures[name]))
        log.info("%d of %d: %s", len(rows), len(runs), ", ".join(rows[-1].values()))
        if file:
            report = {"topology": topology, "settings": _SET.value, "figures": figures}
            write_json(file, report)
    print(markdown_table(rows))
    return 0 if all(figure["fits"] for figure in figures.values()) else 3


if __name__ == "__main__":
    cli.run(main)
