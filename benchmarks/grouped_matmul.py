"""Times `grouped_matmul`, forward and backward, and one dense matmul of the same useful FLOPs.

`python -m benchmarks.grouped_matmul [--shapes=4096x512x1024x8,...] [--backends=auto,ragged]
[--dtype=float32] [--repeats=9] [--json=FILE]`. A shape has M rows, the contracted width D, the
output width F, and E experts. Each row belongs to a random expert. The dense matmul and the
backends are timed in turn. A call computes the value and both gradients.
"""

import jax.numpy as jnp
import numpy as np
from absl import flags

from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.planning.kernel_checks import with_gradients
from benchmarks.timing import (
    compiled,
    machine_in_words,
    medians,
    parse_shapes,
    report,
    run_benchmark,
)

_SHAPES = flags.DEFINE_list(
    "shapes", ["4096x512x1024x8", "4096x512x256x64", "16384x512x256x64"], "MxDxFxE"
)
_BACKENDS = flags.DEFINE_list("backends", ["auto"], "backends to time; ragged is slow on CPU")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of rows and weights")
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls of each function", lower_bound=1)


def _inputs(m, d, f, n_experts, dtype):
    rng = np.random.default_rng(0)
    rows, weights, g = (rng.standard_normal(s) for s in ((m, d), (n_experts, d, f), (m, f)))
    sizes = np.bincount(rng.integers(0, n_experts, m), minlength=n_experts)
    return *(jnp.asarray(a, dtype) for a in (rows, weights, g)), jnp.asarray(sizes, jnp.int32)


def main():
    form = "four numbers MxDxFxE, such as 4096x512x1024x8"
    shapes = parse_shapes(_SHAPES.value, form)
    print(machine_in_words())
    figures = []
    for m, d, f, n_experts in shapes:
        rows, weights, g, sizes = _inputs(m, d, f, n_experts, _DTYPE.value)
        products = {"dense": (lambda r, w: r @ w, weights[0])}
        for name in _BACKENDS.value:
            products[name] = (
                lambda r, w, name=name, sizes=sizes: grouped_matmul(r, w, sizes, backend=name),
                weights,
            )
        timed = {
            name: compiled(with_gradients(product), (rows, w), g, ())
            for name, (product, w) in products.items()
        }
        seconds = medians({name: call for name, (_, call) in timed.items()}, _REPEATS.value)
        for name, (program, _) in timed.items():
            figure = {
                "shape": [m, d, f, n_experts],
                "dtype": _DTYPE.value,
                "backend": name,
                "ms": 1e3 * seconds[name],
                "ratio": seconds[name] / seconds["dense"],
                "tflops": 6 * m * d * f / seconds[name] / 1e12,
                "temp_megabytes": program.memory_analysis().temp_size_in_bytes / 1e6,
            }
            figures.append(figure)
            print(
                f"M={m} D={d} F={f} E={n_experts} {name:>8}: {figure['ms']:8.2f} ms, "
                f"{figure['ratio']:6.2f}x dense; {figure['tflops']:.3f} TFLOP/s; "
                f"temporary memory {figure['temp_megabytes']:.0f} MB",
                flush=True,
            )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
