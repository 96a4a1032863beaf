"""How fast the devices of a mesh multiply, move memory and communicate, all at the same time."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from aoe_jax.config.run import Config
from aoe_jax.moe.parallel.collectives import sum_gradients
from aoe_jax.planning.doctor import kernels

SECONDS, REPEATS = 0.1, 5  # duration of a timed call, and number of calls
INNER = 16  # runs of the inner loop, whose known length needs no synchronisation with the host


class Work(NamedTuple):
    """A function to time. One run on one device is `amount` FLOPs, or bytes moved or received."""

    name: str
    function: Callable
    arrays: list  # shapes of the first arguments, which are drawn
    dtype: str
    inputs: tuple  # the other arguments
    amount: float
    peak: str  # its rate is a share of this field of `hardware.Chip`, or of "matmul"

    @property
    def unit(self):
        """The unit of `amount`."""
        return "B" if self.peak.endswith("bandwidth") else "FLOP"


def seconds_of(work: Work, mesh):
    """The median seconds of a run on all devices at the same time. Runs follow each other in a loop
    on the devices, so the time to start one does not count.
    """
    inner = INNER if mesh.devices.flat[0].platform != "cpu" else 1

    def repeated(n, *args):
        def run(_, carry):
            # The barrier makes each run wait for the one before, and keeps it in the loop.
            return jax.lax.optimization_barrier((carry[0], work.function(*carry[0])))

        results = jax.eval_shape(work.function, *args)
        first = args, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), results)
        runs = partial(jax.lax.fori_loop, 0, inner, run)
        return jax.lax.fori_loop(0, n, lambda _, carry: runs(carry), first)[1]

    loop = kernels.everywhere(mesh, repeated)
    args = *kernels.drawn(mesh, work.arrays, work.dtype), *work.inputs

    def timed(n):
        started = time.perf_counter()
        jax.block_until_ready(loop(n, *args))
        return time.perf_counter() - started

    timed(1)  # compiles
    # All processes must agree on the number.
    n = int(multihost_utils.broadcast_one_to_all(math.ceil(SECONDS / timed(1))))
    return statistics.median(timed(n) for _ in range(REPEATS)) / n / inner


def peaks(config: Config, mesh):
    """The product of two large square matrices, and a pass over a large array."""
    on_cpu, dtype = mesh.devices.flat[0].platform == "cpu", config.model.dtype
    width = 1024 if on_cpu else 8192
    size = 2**25 // mesh.size if on_cpu else 2**27  # float32, more than caches hold
    square, multiply = [(width, width)] * 2, lambda a, b: a @ b
    return [
        Work("matmul", multiply, square, dtype, (), 2 * width**3, "flops"),
        Work("HBM", lambda x: x + 1, [(size,)], "float32", (), 8 * size, "hbm_bandwidth"),
    ]


def attention(config: Config, backend):
    """Attention, forward and with its gradients, at the shapes of a device; useful FLOPs."""
    shape = kernels.attention_shape(config, kernels.sequences_per_device(config))
    case = kernels.attention_case(backend, shape, {"causal": ()})
    b, n_heads, _, s, h = shape
    flops = 2 * b * n_heads * s * s * h
    parts = {"forward": (0, flops), "forward and backward": (slice(None), 3 * flops)}
    return _parts(f"attention {backend}", case, parts, config.model.dtype)


def grouped_products(config: Config, backend, shape):
    """The three products of one weight `[E, D, F]` of `shape`, with random choices."""
    case = kernels.grouped_case(config, backend, shape)
    flops = 2 * kernels.rows_per_device(config) * shape[1] * shape[2]
    parts = {name: (i, flops) for i, name in enumerate(("forward", "d_rows", "d_weights"))}
    return _parts(f"grouped {backend}", case, parts, config.model.dtype)


def _parts(kernel, case, parts, dtype):
    """Pieces of work from `{name: (which of a case's results, FLOPs)}`, for its first input."""
    n, given = len(case.arguments), next(iter(case.inputs.values()))

    def work(name, which, flops):
        def function(*args):
            return kernels.with_gradients(case.function)(args[:n], args[n], args[n + 1 :])[which]

        name = f"{kernel} {case.shape.split()[0]} {name}"
        return Work(name, function, case.arrays, dtype, given, flops, "matmul")

    return [work(name, *part) for name, part in parts.items()]


def collectives(mesh):
    """Collectives over all devices of a mesh with the axis "all"; by the ring algorithms, a device
    of n receives (n - 1) / n of the larger of operand and result.
    """
    n, on_cpu = mesh.size, mesh.devices.flat[0].platform == "cpu"
    rows = max((2**10 if on_cpu else 2**17) // n**2, 1) * n**2  # of 1,024 numbers of 2 bytes

    share, whole, received = [(rows // n, 1024)], [(rows, 1024)], 2048 * rows * (n - 1) / n
    functions = {
        "all_gather": (share, lambda x: jax.lax.all_gather(x, "all", tiled=True)),
        "reduce_scatter": (whole, lambda x: sum_gradients(x, "all", 0)),
        "all_to_all": (whole, lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True)),
    }
    return [
        Work(name, function, shapes, "bfloat16", (), received, "link_bandwidth")
        for name, (shapes, function) in functions.items()
    ]
