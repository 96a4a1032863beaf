"""Plans of the configurations in the table of docs/machines.md: AoE and its router twin on TPU
slices that are not here.

`python -m benchmarks.plans [--rows=NAME,...] [--json=FILE]`, with `libtpu` installed; minutes a
row, of two cores. Each row is `python -m aoe_jax.plan --config=CONFIGURATION --topology=TOPOLOGY`
with the fields in `ROWS`, at 4.2M tokens a step.
"""

from absl import flags

from aoe_jax import cli
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.plan import plan
from aoe_jax.sharding import fill_mesh
from aoe_jax.topology import topology_devices
from benchmarks.timing import report
from configs import large, paper

SHARED = {"balance.aux_tokens": 0.125}  # of all rows
# name -> (AoE, its router twin, topology, fields)
ROWS = {
    "732M@v5e": (
        (paper, "aoe_r256_aux"),
        (paper, "moe_aux"),
        "v5e:4x4",
        {"mesh.fsdp": 16, "train.accumulate": 16},
    ),
    "4B@v5e": (
        (paper, "aoe_4b"),
        (paper, "moe_4b"),
        "v5e:16x16",
        {"mesh.fsdp": 16, "train.accumulate": 4},
    ),
    "4B@v5p": (
        (paper, "aoe_4b"),
        (paper, "moe_4b"),
        "v5p:4x4x4",
        {"mesh.fsdp": 16, "train.accumulate": 2},
    ),
    "64@v5p": ((large, "aoe_64"), (large, "moe_64"), "v5p:8x8x8", {"mesh.fsdp": 64}),
    "256@v5p": ((large, "aoe_256"), (large, "moe_256"), "v5p:8x8x8", {"mesh.fsdp": 64}),
    "732M@v5e-layer": (
        (paper, "aoe_r256_aux"),
        (paper, "moe_aux"),
        "v5e:4x4",
        {"mesh.fsdp": 16, "train.accumulate": 8, "model.remat": "layer"},
    ),
    "4B@v5e-layer": (
        (paper, "aoe_4b"),
        (paper, "moe_4b"),
        "v5e:16x16",
        {"mesh.fsdp": 16, "model.remat": "layer"},
    ),
}

_ROWS = flags.DEFINE_list("rows", list(ROWS), "names of rows")
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def configuration(module, variant, fields):
    """A configuration of `configs/` with `SHARED` and the fields of a row."""
    config = module.get_config(variant)
    config.update_from_flattened_dict(SHARED | fields)
    return Config.from_config_dict(config)


def main():
    """Compiles and prints one configuration a line, and the memory of each pair."""
    unknown = [name for name in _ROWS.value if name not in ROWS]
    if unknown:
        raise UserError(f"--rows={','.join(unknown)} is unknown; choose of {', '.join(ROWS)}")
    figures = []
    for name in _ROWS.value:
        *pair, topology, fields = ROWS[name]
        generation, devices = topology_devices(topology)
        totals = []
        for module, variant in pair:
            config = fill_mesh(configuration(module, variant, fields), len(devices))
            figure = plan(config, generation, devices)
            if not figure["fits"]:
                raise UserError(f"--rows={name}: {variant} does not fit")
            figures.append(
                {
                    "row": name,
                    "variant": variant,
                    "topology": topology,
                    "fields": SHARED | fields,
                    **figure,
                }
            )
            memory, flops = figure["memory_bytes"], figure["flops"]
            totals.append(memory["total"])
            words = [
                f"{memory['total'] / 1e9:.2f} of {figure['hbm_bytes'] / 1e9:.0f} GB "
                f"(state {memory['state'] / 1e9:.2f})",
                f"compiled {flops['compiled'] / flops['useful']:.3f} of useful FLOPs",
                f"{sum(figure['collective_bytes'].values()) / 1e9:.1f} GB received",
                f"step at least {figure['step_seconds']:.2f} s by {figure['bound_by']}",
                f"MFU at most {figure['mfu_bound']:.2f}",
                f"compiled in {figure['compile_seconds']:.0f} s",
            ]
            settings = ", ".join(f"{name} {value}" for name, value in fields.items())
            print(f"{variant:>12} {topology}, {settings}: {', '.join(words)}", flush=True)
        print(f"{'':>12} memory of AoE / its twin: {totals[0] / totals[1]:.3f}", flush=True)
    report(figures, _JSON.value)


if __name__ == "__main__":
    cli.run(main)
