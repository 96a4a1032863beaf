"""Compiles attention for an absent TPU or GPU, and estimates memory and time of each backend.

`python -m benchmarks.attention [--topology=v5e:2x2] [--shapes=BxHxGxSxh,...] [--json=FILE]`.
A TPU needs `libtpu` (`make .venv/libtpu`, `PYTHONPATH=.venv/libtpu`); a GPU, such
as `--topology=h100:1`, needs JAX's CUDA wheels. A shape has B sequences, H query heads, G key and
value heads, S positions and the head width h. The forward and backward pass are compiled in
bfloat16 for one device. `aoe_jax/planning/costs.py` computes HBM traffic and likely time. The time
does not include softmax and transposes inside the kernels, because they are assumed to overlap with
the matrix products.
"""

from absl import flags

from aoe_jax.model.attention import backend_for
from aoe_jax.planning.hardware import chip_part, topology_devices
from aoe_jax.planning.step_plan import read_program
from benchmarks.compiling import compiled_attention
from benchmarks.timing import parse_shapes, run_benchmark, save

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "the device, GENERATION:SHAPE")
_SHAPES = flags.DEFINE_list("shapes", ["8x12x12x2048x64", "2x12x12x8192x64"], "BxHxGxSxh")


def figure(devices, chip, backend, shape):
    """Returns the figures of one backend for one shape."""
    compiled, text = compiled_attention(devices, backend, shape)
    found = read_program(text, chip, shape=())
    return {
        "backend": backend,
        "shape": list(shape),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "hbm_traffic_bytes": found["hbm_traffic_bytes"],
        "likely_seconds": found["likely_step_seconds"],
    }


def main():
    generation, devices = topology_devices(_TOPOLOGY.value)
    chip = chip_part(generation, devices)
    figures = []
    for shape in parse_shapes(_SHAPES.value, "BxHxGxSxh, such as 8x12x12x2048x64", n_sizes=5):
        for backend in (backend_for(devices[0], "bfloat16", shape[-1]), "blocks"):
            figures.append(figure(devices, chip, backend, shape))
            temp, traffic, seconds = list(figures[-1].values())[2:]
            name = "x".join(map(str, shape))
            print(
                f"{generation} {name} {backend}: temporary {temp / 1e9:.2f} GB, HBM traffic "
                f"{traffic / 1e9:.2f} GB, likely {1e3 * seconds:.2f} ms",
                flush=True,
            )
    save(figures)


if __name__ == "__main__":
    run_benchmark(main)
