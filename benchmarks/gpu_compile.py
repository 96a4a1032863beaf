"""Compiles the grouped products for a GPU that is not here, and reads from the program whether they are grouped.

`python -m benchmarks.gpu_compile [--target_config=FILE] [--rows=32768] [--experts=8] [--json=FILE]`, with the
`jax[cuda13]` wheels (`pip install '.[cuda]'`). Each shape of the configurations that the kernels take is compiled forward
and backward in bfloat16. A dense product would show as a dot, or as a temporary of `[rows, experts, width]`.
"""

import os
import re
from pathlib import Path
from unittest import mock

import jax
from absl import flags
from jax.experimental import topologies

from aoe_jax import cli
from aoe_jax.errors import UserError
from aoe_jax.experts.grouped_matmul import mosaic_gpu
from aoe_jax.training.checkpoint import write_json
from benchmarks.compiling import expert_shapes, lower_for

_TARGET = flags.DEFINE_string("target_config", "aoe_jax/h100.txtpb", "the target config of a GPU, in text form")
_ROWS = flags.DEFINE_integer("rows", 2 * 16384, "tokens times experts per token")
_EXPERTS = flags.DEFINE_integer("experts", 8, "number of experts")
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def main():
    """Compiles and prints one product a line."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"  # it would need the GPU
    try:
        target = Path(_TARGET.value).read_text()
    except OSError as error:
        raise UserError(f"--target_config={_TARGET.value}: {error.strerror}") from error
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    m, n_experts = _ROWS.value, _EXPERTS.value
    figures, refused = [], []
    for d, f in expert_shapes():
        try:
            mosaic_gpu.check("bfloat16", d, f)
        except UserError:
            refused.append((d, f))
            continue
        # The kernel for the weights' gradient asks the process's first device for its number of cores.
        with mock.patch.object(jax, "devices", lambda *_: topology.devices):
            compiled = lower_for(topology.devices[0], "mosaic_gpu", m, d, f, n_experts, "bfloat16").compile()
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
    print(
        f"{sum(figure['grouped'] for figure in figures)} of {len(figures)} are grouped; refused, not in blocks: {refused}"
    )
    if _JSON.value:
        write_json(Path(_JSON.value), {"compiled": figures, "refused": refused})
    if not all(figure["grouped"] for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
