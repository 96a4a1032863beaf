"""Compiles grouped products for TPUs and GPUs that this machine lacks. Shows for each chip which
backends compile, and their FLOPs and memory traffic.

`python -m benchmarks.grouped_compile [--generations=v5e,h100,...] [--backends=blocked,...]
[--dtypes=bfloat16,...] [--shapes=DxF,...|all] [--rows=32768] [--experts=8] [--json=FILE]`. TPUs
need `libtpu` (`make .venv/libtpu`, `PYTHONPATH=.venv/libtpu`), and GPUs need the `jax[cuda13]`
wheels (`pip install '.[cuda]'`). `--shapes=all` means the shapes of configs/tiny.py and paper.py. A
star marks the backend that "auto" selects for a chip and dtype. If one product of this backend does
not compile, or needs more than 1.3 (TPU) or 1.1 times (GPU) the useful FLOPs, the exit status is 1;
for `mosaic_gpu` the FLOPs of widths padded to multiples of 64 count as useful there.

Each product is compiled alone; `aoe_jax/planning/costs.py` computes its cost. For TPU, the FLOPs of
a tile with rows of two experts count twice, and the padding of widths to tiles does not count. The
cost of `blocked` assumes balanced loads. If the package tokamax is installed, its kernels for GPU
are compiled, too; their cost is computed in the same way as that of `mosaic_gpu`.
"""

import importlib.util
import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from unittest import mock

from absl import flags
from jax.extend import backend as jax_backend

from aoe_jax.moe.grouped_matmul import BACKENDS, backend_for
from aoe_jax.moe.grouped_matmul.mosaic_gpu import WIDTH_BLOCK
from aoe_jax.planning import costs, hlo
from aoe_jax.planning.hardware import compiling_for
from aoe_jax.planning.kernel_costs import mosaic_gpu_cost
from benchmarks.compiling import PRODUCTS, TOPOLOGIES, devices_of, expert_shapes, lower_for
from benchmarks.timing import check_names, parse_shapes, report, run_benchmark

_GENERATIONS = flags.DEFINE_list("generations", list(TOPOLOGIES), "chips to compile for")
_KERNELS = {"tpu": "megablox", "gpu": "mosaic_gpu"}
_BACKENDS = flags.DEFINE_list(
    "backends", ["blocked", *_KERNELS.values(), "ragged"], "to compare on the chips they support"
)
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "dtypes of rows and weights")
_SHAPES = flags.DEFINE_list("shapes", ["768x3072"], "DxF of an expert's weights, or the word all")
_ROWS = flags.DEFINE_integer("rows", 2 * 16384, "tokens times experts per token")
_EXPERTS = flags.DEFINE_integer("experts", 8, "number of experts")
# Largest allowed FLOPs / useful FLOPs of a default backend; on TPU, 64 experts need 1.25.
_MOST_FLOPS = {"tpu": 1.3, "gpu": 1.1}

TOKAMAX = ("tokamax_mosaic", "tokamax_triton") if importlib.util.find_spec("tokamax") else ()


def _tokamax(implementation, rows, weights, group_sizes):
    import tokamax

    return tokamax.ragged_dot(rows, weights, group_sizes, implementation=implementation)


def _tokamax_cost(name, operands, results, **_):
    if name == "__gpu$xla.gpu.triton":
        return mosaic_gpu_cost("mosaic_gpu", operands, results)
    return None


def figures(generation, backend, shape, dtype, m, n_experts):
    """Compiles each product of `PRODUCTS` with a backend. Returns `{product: dict}`: FLOPs
    divided by the useful `2 M D F`, and the bytes of HBM traffic and of temporary memory. If a
    product does not compile, its dict has only the key "error".
    """
    device = devices_of(generation)[0]
    BACKENDS.update({name: partial(_tokamax, name.removeprefix("tokamax_")) for name in TOKAMAX})
    sizes = m, *shape, n_experts
    # tokamax selects its kernels for JAX's default device, so `device` becomes the default.
    here = mock.patch.object(jax_backend, "get_default_device", lambda: device)
    with compiling_for([device]), here:
        return {name: _figure(device, backend, sizes, dtype, name) for name in PRODUCTS}


def _figure(device, backend, sizes, dtype, product):
    try:
        lowered = lower_for(device, backend, *sizes, dtype, product)
        compiled, text = hlo.compile_and_read(lowered)
    except Exception as error:  # compilers and tokamax raise different types
        return {"error": str(error)}
    operations = costs.Program(text, [*costs.KERNEL_COSTS, _tokamax_cost]).operations
    flops = sum(o.times * max(o.flops, o.occupied_flops) for o in operations)
    return {
        "flops": flops / (2 * math.prod(sizes[:3])),
        "hbm_traffic_bytes": sum(o.times * o.hbm_bytes for o in operations),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _in_own_process(*args):
    """Calls `figures` in another process, because the compiler may crash its process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(figures, *args).result()
        except BrokenProcessPool:
            return {name: {"error": "the compiler ended the process"} for name in PRODUCTS}


def _in_words(figure):
    if "error" in figure:
        return "no"
    traffic, temp = figure["hbm_traffic_bytes"] / 1e9, figure["temp_bytes"] / 1e9
    return f"{figure['flops']:.2f}, {traffic:.2f} GB, {temp:.2f} GB"


def _shapes():
    """Returns the list of `(D, F)` that `--shapes` names."""
    if _SHAPES.value == ["all"]:
        return expert_shapes()
    return parse_shapes(_SHAPES.value, "give two sizes, such as 768x3072, or all", n_sizes=2)


def main():
    check_names("backends", _BACKENDS.value, BACKENDS)
    devices = {generation: devices_of(generation)[0] for generation in _GENERATIONS.value}
    cases = itertools.product(devices.items(), _shapes(), _DTYPES.value)
    m, n_experts, found, n_failed = _ROWS.value, _EXPERTS.value, [], 0
    print("For each product: FLOPs / useful FLOPs, HBM traffic, temporary memory\n")
    print(f"| chip | dtype | DxF | backend | {' | '.join(PRODUCTS)} |\n|{'---|' * 7}", flush=True)
    for (generation, device), shape, dtype in cases:
        foreign = {kernel for name, kernel in _KERNELS.items() if name != device.platform}
        of_gpus = TOKAMAX if device.platform == "gpu" else ()
        default = backend_for(device, dtype, m, n_experts)
        for backend in [*(b for b in _BACKENDS.value if b not in foreign), *of_gpus]:
            figure = _in_own_process(generation, backend, shape, dtype, m, n_experts)
            about = {"generation": generation, "shape": shape, "dtype": dtype, "backend": backend}
            found.append(about | {"is_default": backend == default} | figure)
            if backend == default:
                most = max(figure[name].get("flops", math.inf) for name in PRODUCTS)
                limit = _MOST_FLOPS[device.platform]
                if backend == "mosaic_gpu":
                    padded = (math.ceil(width / WIDTH_BLOCK) * WIDTH_BLOCK for width in shape)
                    limit *= math.prod(padded) / math.prod(shape)
                n_failed += most > limit
            star, (d, f) = "*" if backend == default else "", shape
            cells = [generation, dtype, f"{d}x{f}", backend + star]
            cells += [_in_words(figure[name]) for name in PRODUCTS]
            print(f"| {' | '.join(cells)} |", flush=True)
    report(found)
    return int(n_failed > 0)


if __name__ == "__main__":
    run_benchmark(main)
