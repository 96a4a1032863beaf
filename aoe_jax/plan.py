"""Estimates memory, FLOPs and step time of a run on other hardware.

    python -m aoe_jax.plan --config=FILE[:VARIANT] --topology=v5p:4x4x4

The command compiles the train step of the configuration for hardware that this machine does not
have: for TPU slices with `--topology=GENERATION:SHAPE [--slices=N]`, for the GPUs of a node with
`--topology=h100:8`, or of four nodes with `h100:8x4`. TPUs need the wheel of `libtpu`, and GPUs
JAX's CUDA wheels. `--layouts` ignores the mesh of the configuration, plans up to 16 meshes, and
prints them in the order of their likely time. `aoe_jax/planning/step_plan.py` explains the numbers.
Exit status 3: the run does not fit in memory.
"""

from absl import flags

from aoe_jax import cli
from aoe_jax.data.tokenised import with_vocabulary
from aoe_jax.planning import layouts
from aoe_jax.planning.hardware import topology_devices
from aoe_jax.planning.step_plan import plan, table
from aoe_jax.storage.files import write_json

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "GENERATION:SHAPE, such as v5e:16x16 or h100:8")
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape", lower_bound=1)
_LAYOUTS = flags.DEFINE_bool("layouts", False, "plan several meshes, and print the fastest first")
_JSON = flags.DEFINE_string("json", None, "a file for the report")


def main():
    config, topology = with_vocabulary(cli.parsed_config(_CONFIG)), cli.required(_TOPOLOGY)
    file = cli.file_to_write(_JSON)
    where = topology_devices(topology, _SLICES.value)
    if _LAYOUTS.value:
        reports = layouts.plan_layouts(config, *where)
        print(*map(layouts.line, reports), sep="\n")
        report, best = {"layouts": reports}, reports[0]
    else:
        report = best = plan(config, *where)
        print(table(report))
    if file:
        write_json(file, report)
    return 0 if best["fits"] else 3


command = cli.command(main)
