"""Attention alone, compiled for a TPU or GPU that is not here: memory and likely time by backend.

`python -m benchmarks.attention [--topology=v5e:2x2] [--shapes=BxHxGxSxh,...] [--json=FILE]` with
`libtpu` (`make .venv/libtpu`, `PYTHONPATH=.venv/libtpu`), or with `--topology=h100:1` and JAX's
CUDA wheels. Forward and backward pass in bfloat16, on one device. Traffic and likely time are those
of `aoe_jax/costs.py`; the softmax inside the kernels, which runs beside their products, is not in
the time.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aoe_jax import cli, costs, hlo
from aoe_jax.hardware import CHIPS, count_chips, topology_devices
from aoe_jax.json_files import write_json
from aoe_jax.model.attention import backend_for, causal_attention

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "GENERATION:SHAPE")
_SHAPES = flags.DEFINE_list("shapes", ["8x12x12x2048x64", "2x12x12x8192x64"], "BxHxGxSxh")
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def forward_and_backward(backend, q, k, v, g):
    """The output, and the gradients of q, k and v for the output's gradient g."""
    y, pull_back = jax.vjp(partial(causal_attention, backend=backend), q, k, v)
    return y, pull_back(g)


def figure(devices, chip, backend, shape):
    """Compiles one backend for one shape `(B, H, G, S, h)`."""
    b, n_heads, n_kv, s, h = shape
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    everywhere = PartitionSpec()
    function = jax.shard_map(
        partial(forward_and_backward, backend),
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    args = [
        jax.ShapeDtypeStruct((b, n, s, h), jnp.bfloat16, sharding=NamedSharding(mesh, everywhere))
        for n in (n_heads, n_kv, n_kv, n_heads)
    ]
    with jax.set_mesh(mesh):
        compiled, text = hlo.compile_and_read(jax.jit(function).lower(*args))
    operations = costs.Program(text).operations
    return {
        "backend": backend,
        "shape": list(shape),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "hbm_traffic_bytes": sum(o.times * o.hbm_bytes for o in operations),
        "likely_seconds": sum(o.times * costs.likely_seconds(o, chip) for o in operations),
    }


def main():
    generation, devices = topology_devices(_TOPOLOGY.value)
    chip = CHIPS[generation].part(count_chips(devices) / len(devices))
    figures = []
    for text in _SHAPES.value:
        shape = tuple(int(n) for n in text.split("x"))
        for backend in (backend_for(devices[0], "bfloat16", shape[-1]), "blocks"):
            figures.append(figure(devices, chip, backend, shape))
            temp, traffic, seconds = list(figures[-1].values())[2:]
            print(
                f"{generation} {text} {backend}: temporary {temp / 1e9:.2f} GB, HBM traffic "
                f"{traffic / 1e9:.2f} GB, likely {1e3 * seconds:.2f} ms",
                flush=True,
            )
    if _JSON.value:
        write_json(Path(_JSON.value), figures)


if __name__ == "__main__":
    cli.run(main)
