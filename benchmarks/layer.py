"""Times the forward and backward pass of one MoE layer. Compares the router MoE with a dense SwiGLU
of equal active FLOPs, and AoE with the router MoE.

`python -m benchmarks.layer [--tokens=4096] [--shapes=256x8x2x512,...] [--dtype=float32]
[--repeats=9] [--json=FILE]`. A shape is d_model, n_experts, top_k, d_ffn. AoE has as many
parameters as the router MoE (Eq. 5) and d_low = d_model / 3. `useful FLOPs` (analytic) and `peak
memory` (arguments, results and temporaries) are ratios to those of the layer's baseline.
"""

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.model.counts import layer_flops_per_token
from benchmarks.compiling import experts_layer
from benchmarks.timing import (
    compiled,
    machine_in_words,
    medians,
    parse_shapes,
    report,
    run_benchmark,
)

_TOKENS = flags.DEFINE_integer("tokens", 4096, "tokens", lower_bound=1)
_SHAPES = flags.DEFINE_list(
    "shapes", ["256x8x2x512", "256x64x8x128"], "d_model x n_experts x top_k x d_ffn"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the computation")
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls of each function", lower_bound=1)


def configurations(d, n_experts, top_k, d_ffn):
    """Returns `{name: (Config, name of its baseline)}`."""
    model = ModelConfig(n_heads=1, d_model=d, dtype=_DTYPE.value)
    shared = {"n_experts": n_experts, "top_k": top_k, "d_ffn": d_ffn}
    arms = {
        "dense": (ExpertsConfig(kind="dense", d_ffn=top_k * d_ffn), "dense"),
        "router": (ExpertsConfig(kind="router", **shared), "dense"),
        "aoe": (ExpertsConfig(kind="aoe", d_low=round(d / 3), **shared), "router"),
    }
    balance = BalanceConfig(aux_weight=0.0)
    return {
        name: (Config(model=model, experts=experts, balance=balance), baseline)
        for name, (experts, baseline) in arms.items()
    }


def _gradient(config, n_tokens):
    """Returns a function that computes the gradients of a loss, and its peak memory in bytes."""
    layer = experts_layer(config)
    x = jax.random.normal(jax.random.key(0), (n_tokens, config.model.d_model), layer.dtype)
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]

    def loss(params, x):
        y, _ = layer.apply({"params": params}, x)
        return (y.astype(jnp.float32) ** 2).mean()

    program, run = compiled(jax.grad(loss, (0, 1)), params, x)
    memory = program.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return run, size


def main():
    form = "d_model x n_experts x top_k x d_ffn, such as 256x8x2x512"
    shapes, n_tokens = parse_shapes(_SHAPES.value, form), _TOKENS.value
    print(machine_in_words())
    figures = []
    for shape in shapes:
        layers = configurations(*shape)
        timed = {name: _gradient(config, n_tokens) for name, (config, _) in layers.items()}
        seconds = medians({name: run for name, (run, _) in timed.items()}, _REPEATS.value)
        flops = {name: layer_flops_per_token(config) for name, (config, _) in layers.items()}
        for name, (_, baseline) in layers.items():
            figure = {
                "shape": list(shape),
                "tokens": n_tokens,
                "layer": name,
                "baseline": baseline,
                "ms": 1e3 * seconds[name],
                "ratio": seconds[name] / seconds[baseline],
                "useful_ratio": flops[name] / flops[baseline],
                "peak_ratio": timed[name][1] / timed[baseline][1],
            }
            figures.append(figure)
            print(
                f"d={shape[0]} {shape[2]} of {shape[1]} f={shape[3]} {name:>6}: "
                f"{figure['ms']:7.1f} ms, {figure['ratio']:.2f}x {baseline} "
                f"(useful FLOPs {figure['useful_ratio']:.2f}x), "
                f"peak memory {figure['peak_ratio']:.2f}x",
                flush=True,
            )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
