"""Times the forward and backward pass of one MoE layer. Compares the router MoE with a dense SwiGLU
of equal active FLOPs, and AoE with the router MoE.

`python -m benchmarks.layer [--tokens=4096] [--shapes=256x8x2x512,...] [--dtype=float32]
[--repeats=9] [--json=FILE]`. A shape is d_model, n_experts, top_k, d_ffn. AoE has as many
parameters as the router MoE (Eq. 5) and d_low = d_model / 3. `useful FLOPs` (analytic) and `peak
memory` (arguments, results and temporaries) are ratios to those of the layer's baseline.

The phases of the AoE layer's forward pass are also timed separately.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.model.counts import layer_flops_per_token
from aoe_jax.moe.collectives import Devices
from aoe_jax.moe.dispatch import Local
from aoe_jax.moe.routing import by_token, top_k
from aoe_jax.moe.scoring import activation_norms, sparse_scores
from aoe_jax.moe.swiglu import gate_pre_activations, swiglu
from benchmarks.compiling import experts_layer, unweighted_aux_loss
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
    aoe = ExpertsConfig(kind="aoe", d_low=round(d / 3), **shared)
    published = dataclasses.replace(aoe, score_gradient="dense")
    no_loss, eighth = BalanceConfig(aux_weight=0.0), BalanceConfig(aux_tokens=0.125)
    arms = {
        "dense": (ExpertsConfig(kind="dense", d_ffn=top_k * d_ffn), no_loss, "dense"),
        "router": (ExpertsConfig(kind="router", **shared), no_loss, "dense"),
        "aoe": (aoe, no_loss, "router"),
        "aoe, L_aux of 1/8": (aoe, eighth, "router"),
        "aoe as published": (published, BalanceConfig(), "router"),
    }
    return {
        name: (Config(model=model, experts=experts, balance=balance), baseline)
        for name, (experts, balance, baseline) in arms.items()
    }


def _inputs(config, n_tokens):
    """Returns the layer of a configuration, random tokens `[T, d]` and parameters."""
    layer = experts_layer(config)
    x = jax.random.normal(jax.random.key(0), (n_tokens, config.model.d_model), layer.dtype)
    return layer, x, jax.jit(layer.init)(jax.random.key(1), x)["params"]


def _gradient(config, n_tokens):
    """Returns a function that computes the gradients of a loss, and its peak memory in bytes."""
    layer, x, params = _inputs(config, n_tokens)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x)
        aux_loss = unweighted_aux_loss(stats, config.balance)
        return (y.astype(jnp.float32) ** 2).mean() + config.balance.aux_weight * aux_loss

    program, run = compiled(jax.grad(loss, (0, 1)), params, x)
    memory = program.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return run, size


def _phases(config, n_tokens):
    """Returns `{name: function}`; a function runs the forward pass of one phase of an AoE layer."""
    layer, x, params = _inputs(config, n_tokens)
    w, k = {name: a.astype(layer.dtype) for name, a in params.items()}, config.experts.top_k
    transport = Local(Devices(), config.experts.n_experts, config.experts.top_k, all_used=True)

    def score(x, w_gate_down):
        return sparse_scores(x, w_gate_down, activation_norms, 1)[0]

    def route(scores):
        routing = top_k(scores, k)
        return routing.expert.reshape(-1, k), routing.weight.reshape(-1, k)

    def dispatch(x, expert, weight):
        return transport.dispatch(x, transport.schedule(by_token(expert, weight)))[0]

    scores = score(x, w["w_gate_down"])
    expert, weight = route(scores)
    routing, layout = round = transport.schedule(by_token(expert, weight))
    rows, groups = transport.dispatch(x, round)
    row_weight = transport.row_values(routing.weight, round)

    def experts(rows, row_weight, w):
        gate, _, rows = gate_pre_activations(rows, groups, w)
        return swiglu(rows, gate, row_weight, groups, w)

    def combine(rows, layout):
        return transport.combine(rows, (routing, layout), n_tokens)

    phases = {
        "score": compiled(score, x, w["w_gate_down"]),
        "route": compiled(route, scores),
        "dispatch": compiled(dispatch, x, expert, weight),
        "experts": compiled(experts, rows, row_weight, w),
        "combine": compiled(combine, rows, layout),
    }
    return {name: run for name, (_, run) in phases.items()}


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
                f"d={shape[0]} {shape[2]} of {shape[1]} f={shape[3]} {name:>18}: "
                f"{figure['ms']:7.1f} ms, {figure['ratio']:.2f}x {baseline} "
                f"(useful FLOPs {figure['useful_ratio']:.2f}x), "
                f"peak memory {figure['peak_ratio']:.2f}x",
                flush=True,
            )
        seconds = medians(_phases(layers["aoe"][0], n_tokens), _REPEATS.value)
        ms = {name: 1e3 * s for name, s in seconds.items()}
        figures.append({"shape": list(shape), "phases_ms": ms})
        words = ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
        print(f"  phases, forward: {words}", flush=True)
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
