"""One layer of experts, forward+backward: router MoE beside a dense SwiGLU of equal active FLOPs,
and AoE beside router.

`python -m benchmarks.layer [--tokens=4096] [--shapes=256x8x2x512,...] [--dtype=float32]
[--repeats=9] [--json=FILE]`; a shape is d_model, n_experts, top_k, d_ffn. AoE has the same total
parameters (Eq. 5), d_low = d_model / 3. `useful` is the ratio of analytic FLOPs. `peak` is
arguments, results and temporaries of the compiled program, over those of the baseline.

Then the stations of the AoE layer, each alone, forward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax import cli
from aoe_jax.config import BalanceConfig, Config, ExpertsConfig, ModelConfig
from aoe_jax.counts import layer_flops_per_token
from aoe_jax.experts import dispatch, scoring
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection.assignment import Assignment
from aoe_jax.experts.selection.top_k import top_k
from aoe_jax.experts.swiglu import swiglu
from benchmarks.timing import keep_freed_memory, machine, medians, parse_sizes, report

_TOKENS = flags.DEFINE_integer("tokens", 4096, "tokens", lower_bound=1)
_SHAPES = flags.DEFINE_list(
    "shapes", ["256x8x2x512", "256x64x8x128"], "d_model x n_experts x top_k x d_ffn"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the computation")
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls of each function", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def configurations(d, n_experts, top_k, d_ffn):
    """name -> `(ExpertsConfig, BalanceConfig, name of its baseline)`."""
    shared = {"n_experts": n_experts, "top_k": top_k, "d_ffn": d_ffn}
    aoe = ExpertsConfig(kind="aoe", d_low=round(d / 3), **shared)
    no_loss, published = (
        BalanceConfig(aux_weight=0.0),
        dataclasses.replace(aoe, score_gradient="dense"),
    )
    return {
        "dense": (ExpertsConfig(kind="dense", d_ffn=top_k * d_ffn), no_loss, "dense"),
        "router": (ExpertsConfig(kind="router", **shared), no_loss, "dense"),
        "aoe": (aoe, no_loss, "router"),
        "aoe, L_aux of 1/8": (aoe, BalanceConfig(aux_tokens=0.125), "router"),
        "aoe as published": (published, BalanceConfig(), "router"),
    }


def _useful_flops(d, experts, balance):
    return layer_flops_per_token(Config(ModelConfig(n_heads=1, d_model=d), experts, balance))[1]


def _layer(d, experts, balance, n_tokens, dtype):
    """A nullary function, forward+backward in parameters and tokens, and the bytes of the program."""
    layer = LAYERS[experts.kind](experts, jnp.dtype(dtype), balance)
    x = jax.random.normal(jax.random.key(0), (n_tokens, d), dtype)
    params = jax.jit(layer.init)(jax.random.key(1), x)["params"]

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x)
        aux_loss = (stats.load * stats.mean_probability).sum() if balance.has_loss else 0.0
        return (y.astype(jnp.float32) ** 2).mean() + balance.aux_weight * aux_loss

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (lambda: compiled(params, x)), size


def _stations(d, experts, n_tokens, dtype):
    """name -> nullary function, the forward pass of each station of an AoE layer alone."""
    layer = LAYERS["aoe"](experts, dtype=jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(0), (n_tokens, d), dtype)
    p = jax.tree.map(lambda a: a.astype(dtype), jax.jit(layer.init)(jax.random.key(1), x)["params"])
    scores = scoring.sparse_scores(x, p["w_down"], 1)[0]
    assignment = top_k(scores, experts.top_k)
    arrays, k = assignment[:3], assignment.slots_per_token
    plan = dispatch.plan_rows(assignment, experts.n_experts)
    rows = dispatch.dispatch(x, assignment, plan)

    def run_experts(rows, weight, p):
        c = grouped_matmul(rows, p["w_down"], plan.groups)
        gate = grouped_matmul(c, p["w_up"], plan.groups)
        return swiglu(rows, gate, weight, p["w_p"], p["w_o"], plan.groups)

    def compiled(function, *args):
        function = jax.jit(function).lower(*args).compile()
        return lambda: function(*args)

    return {
        "score": compiled(lambda x, w: scoring.sparse_scores(x, w, 1)[0], x, p["w_down"]),
        "select": compiled(lambda s: top_k(s, experts.top_k)[:3], scores),
        "dispatch": compiled(
            lambda x, a: (
                lambda a: dispatch.dispatch(x, a, dispatch.plan_rows(a, experts.n_experts))
            )(Assignment(*a, k)),
            x,
            arrays,
        ),
        "experts": compiled(run_experts, rows, dispatch.row_values(assignment.weight, plan), p),
        "combine": compiled(
            lambda r, plan: dispatch.combine(r, assignment, plan, n_tokens), rows, plan
        ),
    }


def main():
    """Times and prints one layer a line, then the stations."""
    keep_freed_memory()
    shapes = [
        parse_sizes(shape, 4, "d_model x n_experts x top_k x d_ffn, such as 256x8x2x512")
        for shape in _SHAPES.value
    ]
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    figures = []
    for shape in shapes:
        d, layers = shape[0], configurations(*shape)
        timed = {name: _layer(d, *layers[name][:2], _TOKENS.value, _DTYPE.value) for name in layers}
        seconds = medians({name: function for name, (function, _) in timed.items()}, _REPEATS.value)
        flops = {name: _useful_flops(d, *layers[name][:2]) for name in layers}
        for name, (_, _, baseline) in layers.items():
            figure = {
                "shape": list(shape),
                "tokens": _TOKENS.value,
                "layer": name,
                "baseline": baseline,
                "ms": 1e3 * seconds[name],
                "ratio": seconds[name] / seconds[baseline],
                "useful_ratio": flops[name] / flops[baseline],
                "peak_ratio": timed[name][1] / timed[baseline][1],
            }
            figures.append(figure)
            print(
                f"d={d} {shape[2]} of {shape[1]} f={shape[3]} {name:>18}: {figure['ms']:7.1f} ms, "
                f"{figure['ratio']:.2f}x {baseline} (useful FLOPs {figure['useful_ratio']:.2f}x), "
                f"peak memory {figure['peak_ratio']:.2f}x",
                flush=True,
            )
        seconds = medians(
            _stations(d, layers["aoe"][0], _TOKENS.value, _DTYPE.value), _REPEATS.value
        )
        figures.append(
            {"shape": list(shape), "stations_ms": {name: 1e3 * s for name, s in seconds.items()}}
        )
        print(
            "  stations, forward: "
            + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items()),
            flush=True,
        )
    report(figures, _JSON.value)


if __name__ == "__main__":
    cli.run(main)
