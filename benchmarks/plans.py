"""Computes the figures of docs/plans.md: estimated memory and step time of AoE and the MoE.

`python -m benchmarks.plans [--rows=NAME,...] [--json=FILE]` needs `libtpu` for TPUs and JAX's CUDA
wheels for GPUs; a row takes minutes on two cores. `python -m aoe_jax.plan --config=CONFIGURATION
--topology=TOPOLOGY` computes the same figures if its flags set the fields in `ROWS` and `SHARED`.
"""

from absl import flags

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.planning.hardware import topology_devices
from aoe_jax.planning.step_plan import plan
from benchmarks.timing import check_names, report, run_benchmark
from configs import large, paper

# One micro-batch per step; L_aux, if it is used, is computed from an eighth of the tokens.
SHARED = {"balance.aux_tokens": 0.125, "train.accumulate": 1}
SMALL = (paper, "aoe_whole_aux", "aoe_r256_aux", "moe_aux")
MIDDLE = (paper, "aoe_4b", "moe_4b")
LONG = {"data.seq_len": 32_768, "model.max_len": 32_768}
# name -> (module, AoE variants, MoE variant), topology, sequences per device, other fields
ROWS = {
    "732M@v5e": (SMALL, "v5e:4x4", 8, {"mesh.fsdp": 16}),
    "732M@v5p": (SMALL, "v5p:4x4x4", 8, {"mesh.fsdp": 64}),
    "732M@v6e": (SMALL, "v6e:4x4", 8, {"mesh.fsdp": 16}),
    "732M@tpu7x": (SMALL, "tpu7x:2x2x4", 8, {"mesh.fsdp": 32}),
    "732M@h100": (SMALL, "h100:8", 8, {"mesh.fsdp": 8}),
    "732M@b200": (SMALL, "b200:8", 8, {"mesh.fsdp": 8}),
    "732M-32k@v5p": (SMALL, "v5p:4x4x4", 1, {"mesh.fsdp": 64, **LONG}),
    "4B@v5e": (MIDDLE, "v5e:16x16", 8, {"mesh.fsdp": 16}),
    "4B@v5p": (MIDDLE, "v5p:4x4x4", 8, {"mesh.fsdp": 16}),
    "64@v5p": ((large, "aoe_whole_64", "aoe_64", "moe_64"), "v5p:8x8x8", 2, {"mesh.fsdp": 64}),
    "256@v5p": ((large, "aoe_whole_256", "aoe_256", "moe_256"), "v5p:8x8x8", 2, {"mesh.fsdp": 64}),
}
COLUMNS = (
    "configuration",
    "machine, mesh",
    "memory per device (temporary)",
    "HBM traffic",
    "likely step (at the peaks, by cycles; network)",
    "likely MFU",
    "step at least",
    "MFU at most",
    "AoE / MoE: memory, traffic, likely step",
)

_ROWS = flags.DEFINE_list("rows", list(ROWS), "names of rows")


def configuration(module, variant, fields):
    """Returns a configuration of `configs/` with `SHARED` and the fields of a row."""
    config = module.get_config(variant)
    config.update_from_flattened_dict(SHARED | fields)
    return Config.from_config_dict(config)


def plans_of(name):
    """Yields the plan of each configuration of a row; the router MoE is the last one."""
    (module, *variants), topology, sequences, fields = ROWS[name]
    generation, devices = topology_devices(topology)
    fields = {"train.batch_size": sequences * len(devices), **fields}
    for variant in variants:
        figure = plan(configuration(module, variant, fields), generation, devices)
        if not figure["fits"]:
            raise UserError(f"--rows={name}: {variant} does not fit in memory")
        file = module.__name__.rpartition(".")[2]
        what = {"row": name, "configuration": f"{file}.py:{variant}", "topology": topology}
        yield {**what, "fields": SHARED | fields, **figure}


def cells(figure, twin=None):
    """Returns the table's cells for a plan. For AoE, `twin` is the plan of the router MoE."""
    memory, traffic, step = compared = _compared(figure)
    mesh = (f"{name} {n}" for name, n in figure["mesh"].items() if name != "transport" and n > 1)
    network = figure["seconds_by_scope"].get("network", 0)
    times = [step, figure["seconds_at_peaks"], figure["seconds_by_cycles"], network]
    likely, peaks, cycles, network = (f"{1e3 * seconds:.0f}" for seconds in times)
    ratios = twin and (f"{a / b:.2f}" for a, b in zip(compared, _compared(twin), strict=True))
    return (
        f"`{figure['configuration']}`",
        f"{figure['topology']}, {', '.join(mesh)}",
        f"{memory / 1e9:.1f} GB ({figure['memory_bytes']['temp'] / 1e9:.1f})",
        f"{traffic / 1e9:.0f} GB",
        f"{likely} ms ({peaks}, {cycles}; {network})",
        f"{figure['likely_mfu']:.2f}",
        f"{1e3 * figure['step_seconds']:.0f} ms, {figure['bound_by']}",
        f"{figure['mfu_bound']:.2f}",
        ", ".join(ratios or ()),
    )


def _compared(figure):
    memory = figure["memory_bytes"]["total"]
    return memory, figure["hbm_traffic_bytes"], figure["likely_step_seconds"]


def main():
    check_names("rows", _ROWS.value, ROWS)
    figures = []
    print(_line(COLUMNS), _line("---" for _ in COLUMNS), sep="\n", flush=True)
    for name in _ROWS.value:
        *of_aoe, moe = plans_of(name)
        print(*(_line(cells(aoe, moe)) for aoe in of_aoe), _line(cells(moe)), sep="\n", flush=True)
        figures += [*of_aoe, moe]
    report(figures)


def _line(cells):
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_benchmark(main)
