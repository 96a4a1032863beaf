"""Compiles the grouped products of every configuration for TPUs that are not here, and reports
which compile and with how many FLOPs.

`python -m benchmarks.tpu_compile [--generations=v4,v5e,...] [--rows=32768] [--experts=8]
[--json=FILE]` on any machine with `libtpu` (`make .venv/libtpu`, `PYTHONPATH=.venv/libtpu`). Each
product is compiled forward and backward, in bfloat16 and float32.

Both figures are relative to the useful FLOPs: `flops` are the compiler's, in which a Pallas kernel
counts with the useful FLOPs that it declares; `tile_flops` counts whole tiles at the worst group
sizes.
"""

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.compiling import (
    TOPOLOGIES,
    expert_shapes,
    lower_for,
    megablox_tile_flops,
    tpu_devices,
)
from benchmarks.timing import run_benchmark, save

_GENERATIONS = flags.DEFINE_list("generations", list(TOPOLOGIES), f"of {', '.join(TOPOLOGIES)}")
_ROWS = flags.DEFINE_integer("rows", 2 * 16384, "tokens times experts per token")
_EXPERTS = flags.DEFINE_integer("experts", 8, "number of experts")


def main():
    m, n_experts = _ROWS.value, _EXPERTS.value
    figures = []
    devices = {generation: tpu_devices(generation)[0] for generation in _GENERATIONS.value}
    for generation, device in devices.items():
        for d, f in expert_shapes():
            for dtype in ("bfloat16", "float32"):
                figure = {
                    "generation": generation,
                    "rows": m,
                    "experts": n_experts,
                    "shape": [d, f],
                    "dtype": dtype,
                }
                try:
                    compiled = lower_for(device, "megablox", m, d, f, n_experts, dtype).compile()
                    figure["flops"] = compiled.cost_analysis()["flops"] / (6 * m * d * f)
                    figure["tile_flops"] = megablox_tile_flops(
                        m, d, f, n_experts, jnp.dtype(dtype).itemsize
                    )
                except jax.errors.JaxRuntimeError as error:
                    figure["error"] = str(error)
                figures.append(figure)
                print(*figure.values(), flush=True)
    failed = sum("error" in figure for figure in figures)
    print(f"{len(figures) - failed} of {len(figures)} compile")
    save(figures)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_benchmark(main)
