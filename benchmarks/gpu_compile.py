"""Compiles the grouped products for an H100 that is not here, and checks in the program that they
are grouped.

`python -m benchmarks.gpu_compile [--rows=32768] [--experts=8] [--json=FILE]`, with the
`jax[cuda13]` wheels (`pip install '.[cuda]'`). Each shape of the configurations that the kernels
take is compiled forward and backward in bfloat16. A dense product would show as a dot, or as a
temporary of `[rows, experts, width]`.
"""

import re
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import UserError
from aoe_jax.json_files import write_json
from aoe_jax.moe.grouped_matmul import mosaic_gpu
from aoe_jax.topology import compiling_for, topology_devices
from benchmarks.compiling import expert_shapes, lower_for

_ROWS = flags.DEFINE_integer("rows", 2 * 16384, "tokens times experts per token")
_EXPERTS = flags.DEFINE_integer("experts", 8, "number of experts")
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def main():
    """Compiles and prints one product a line."""
    _, devices = topology_devices("h100:1")
    m, n_experts = _ROWS.value, _EXPERTS.value
    figures, refused = [], []
    for d, f in expert_shapes():
        try:
            mosaic_gpu.check("bfloat16", d, f)
        except UserError:
            refused.append((d, f))
            continue
        with compiling_for(devices):
            compiled = lower_for(devices[0], "mosaic_gpu", m, d, f, n_experts, "bfloat16").compile()
        text = compiled.as_text()
        figure = {
            "shape": [d, f],
            "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
            "other_products": len(re.findall(r"\bdot\(|cublas|__triton_gemm", text)),
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "largest_dense_bytes": 2 * m * n_experts * max(d, f),
        }
        figure["grouped"] = (figure["kernels"], figure["other_products"]) == (3, 0)
        figure["grouped"] &= figure["temp_bytes"] < figure["largest_dense_bytes"]
        figures.append(figure)
        print(", ".join(f"{key} {value}" for key, value in figure.items()), flush=True)
    n_grouped = sum(figure["grouped"] for figure in figures)
    print(f"{n_grouped} of {len(figures)} are grouped; refused, not in blocks: {refused}")
    if _JSON.value:
        write_json(Path(_JSON.value), {"compiled": figures, "refused": refused})
    if n_grouped < len(figures):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
