"""Our dropless router MoE beside the MoE of the Flax tradition: experts of fixed capacity, with
dispatch and combine as einsums.

`python -m benchmarks.baselines [--shapes=128x8x2x256,...] [--batch=8] [--length=256]
[--factors=1,1.25,2] [--dtype=float32] [--tunix] [--nomodel] [--repeats=7] [--json=FILE]`. A shape
is d_model, n_experts, top_k, d_ffn. First one layer, forward+backward in parameters and tokens,
then a training step of `configs/tiny.py`, of 8 sequences of 256 random tokens, L_aux of all.
`computed` is the FLOPs of the products over the useful ones (`Capacity.wasted_flops`); `memory` is
the temporary memory of the compiled program, over that of the router; `dropped` is the share of the
choices that found their expert full, by an untrained router or, for the step, after as many steps
as were timed. `eval.py` shows it for a trained model.

`--tunix` adds two layers of the package `google-tunix` (`pip install '.[baselines]'`; Flax NNX),
with our parameters. Its Qwen3 layer computes the same function as our router layer (`differs` is
the largest difference over the largest output); without a mesh, and on CPU always, every expert
computes every token, most of them as zeros. Its Gemma 4 layer sorts rows by expert for
`jax.lax.ragged_dot`, which is dense on CPU; it has GELU instead of SiLU and scales of its own.
Neither drops tokens, and neither has a balance loss.

Other packages of PyPI with MoE layers in Flax, tried in 2026 with Python 3.11, JAX 0.10.2 and Flax
0.12.8: nano-moe-jax 0.1.0 installs, but its experts have two matrices and all compute all tokens;
praxis and paxml 1.4.0, which have GShard's einsums, EasyDeL 0.3.0 and DantinoX 0.4.14 are pinned to
other versions; MaxText 0.2.5 and gemma 4.0.1 need Python 3.12.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.methods.capacity import Capacity
from aoe_jax.model.counts import layer_flops_per_token, training_flops_per_token
from aoe_jax.moe.routing import TopK
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.compiling import experts_layer
from benchmarks.timing import (
    compiled,
    configuration,
    machine_in_words,
    medians,
    parse_shapes,
    report,
    run_benchmark,
)

_BATCH = flags.DEFINE_integer("batch", 8, "sequences, of the layers", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "tokens of a sequence, of the layers", lower_bound=1)
_SHAPES = flags.DEFINE_list(
    "shapes", ["128x8x2x256", "256x64x8x128"], "d_model x n_experts x top_k x d_ffn, of the layers"
)
_FACTORS = flags.DEFINE_list("factors", ["1", "1.25", "2"], "capacity factors")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the layers' computation"
)
_TUNIX = flags.DEFINE_bool("tunix", False, "layers of google-tunix too")
_MODEL = flags.DEFINE_bool("model", True, "a training step of configs/tiny.py too")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed calls of each", lower_bound=1)

ROUTER = "router, dropless"


def methods():
    """`{layer: (experts.kind, routing)}`; raises `UserError` for a wrong capacity factor."""
    found = {ROUTER: ("router", TopK())}
    for text in _FACTORS.value:
        try:
            factor = float(text)
        except ValueError:
            factor = 0.0
        if not 0 < factor < math.inf:
            raise UserError(f"--factors={text}: must be numbers greater than 0, such as 1,1.25,2")
        found[f"capacity {text}"] = ("capacity", Capacity(capacity_factor=factor))
    return found


def layer_config(shape, kind, routing):
    """A `Config` of one layer and its counts."""
    d, n_experts, top_k, d_ffn = shape
    return Config(
        model=ModelConfig(n_heads=1, d_model=d, max_len=_LENGTH.value, dtype=_DTYPE.value),
        experts=ExpertsConfig(kind=kind, n_experts=n_experts, top_k=top_k, d_ffn=d_ffn),
        routing=routing,
        balance=BalanceConfig(aux_weight=0.0),
        data=DataConfig(seq_len=_LENGTH.value),
    )


def _computed(config, useful, layers=1):
    """FLOPs of the products of a layer or model in training, over the useful ones."""
    is_capacity = config.experts.kind == "capacity"
    surplus = config.routing.wasted_flops(config)[1] if is_capacity else 0
    return 1 + layers * surplus / useful


def _gradient(apply):
    """Forward+backward of `apply(params, x)` in both."""
    return jax.grad(lambda params, x: (apply(params, x).astype(jnp.float32) ** 2).mean(), (0, 1))


def _import_tunix():
    """The modules `(nnx, gemma4.model, gemma4.moe, qwen3.model)`; UserError if one is missing."""
    try:
        from flax import nnx
        from tunix.models.gemma4 import model as gemma4
        from tunix.models.gemma4 import moe
        from tunix.models.qwen3 import model as qwen3
    except ImportError as e:
        raise UserError(f"--tunix: {e.name} is missing; pip install '.[baselines]'") from e
    return nnx, gemma4, moe, qwen3


def _tunix_layers(shape, params, dtype):
    """name -> `(apply, params)`: layers of google-tunix with the parameters of our router layer."""
    nnx, gemma4, moe, qwen3 = _import_tunix()
    d, n_experts, top_k, d_ffn = shape
    shared = {"num_layers": 1, "embed_dim": d, "num_heads": 1, "head_dim": d, "num_kv_heads": 1}
    shared |= {
        "num_experts": n_experts,
        "num_experts_per_tok": top_k,
        "dtype": dtype,
        "param_dtype": jnp.float32,
    }
    of_qwen3 = qwen3.ModelConfig(
        vocab_size=1, hidden_dim=d_ffn, rope_theta=1e4, norm_eps=1e-6, **shared
    )
    of_gemma4 = gemma4.ModelConfig(
        num_embed=1, hidden_dim=d_ffn, expert_dim=d_ffn, enable_moe=True, **shared
    )
    gates = jnp.stack([params["w_gate"], params["w_up"]], axis=1).swapaxes(2, 3)
    layers = {
        "tunix, Qwen3": (
            qwen3.MoELayer(of_qwen3, rngs=nnx.Rngs(0)),
            {
                "router": {"kernel": params["w_router"]},
                "gate_proj": params["w_gate"],
                "up_proj": params["w_up"],
                "down_proj": params["w_down"],
            },
        ),
        "tunix, Gemma 4": (
            moe.MoERagged(of_gemma4, rngs=nnx.Rngs(0)),
            {
                "router_logits": params["w_router"],
                "gating_einsum": gates,
                "linear": params["w_down"],
            },
        ),
    }
    found = {}
    for name, (layer, values) in layers.items():
        graph, state = nnx.split(layer)
        state.replace_by_pure_dict(nnx.to_pure_dict(state) | values)
        found[name] = (lambda state, x, graph=graph: nnx.merge(graph, state)(x), state)
    return found


def layers(shape):
    """name -> `(compiled gradient, a function that calls it, figures)` of one layer of each arm."""
    dtype = jnp.dtype(_DTYPE.value)
    x = jax.random.normal(jax.random.key(0), (_BATCH.value, _LENGTH.value, shape[0]), dtype)
    arms, params, outputs = {}, None, {}
    for name, (kind, routing) in methods().items():
        config = layer_config(shape, kind, routing)
        layer = experts_layer(config)
        if params is None:  # all arms share those of the first
            params = jax.jit(layer.init)(jax.random.key(1), x)["params"]
        outputs[name], stats = jax.jit(layer.apply)({"params": params}, x)
        figures = {"computed": _computed(config, layer_flops_per_token(config)[1])}
        if stats.dropped_share is not None:
            figures["dropped"] = float(stats.dropped_share)
        gradient = _gradient(lambda w, x, layer=layer: layer.apply({"params": w}, x)[0])
        arms[name] = *compiled(gradient, params, x), figures
    others = _tunix_layers(shape, params, dtype) if _TUNIX.value else {}
    for name, (apply, state) in others.items():
        figures = {}
        if "Qwen3" in name:
            wanted = outputs[ROUTER]
            difference = jnp.abs(jax.jit(apply)(state, x) - wanted).max() / jnp.abs(wanted).max()
            figures["differs"] = float(difference)
        arms[name] = *compiled(_gradient(apply), state, x), figures
    return arms


def _report_arms(title, seconds, programs, figures):
    """Prints an arm a line, and returns its figures."""
    temporary = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    found = []
    for name in programs:
        figure = {
            "what": title,
            "arm": name,
            "ms": 1e3 * seconds[name],
            "ratio": seconds[name] / seconds[ROUTER],
            "temporary_bytes": temporary[name],
            "memory_ratio": temporary[name] / temporary[ROUTER],
            **figures[name],
        }
        found.append(figure)
        rest = [f"computed {figure['computed']:.2f}x"] if "computed" in figure else []
        rest += [f"dropped {100 * figure['dropped']:.2f}%"] if "dropped" in figure else []
        rest += [f"differs by {figure['differs']:.1e}"] if "differs" in figure else []
        print(
            f"{title} {name:>16}: {figure['ms']:8.1f} ms, {figure['ratio']:.2f}x, "
            f"memory {figure['memory_ratio']:.2f}x" + "".join(f", {words}" for words in rest),
            flush=True,
        )
    return found


def model_configs():
    """name -> `Config` of a training step of each arm."""
    router = configuration("moe", {"balance": {"aux_tokens": 1.0}})
    return {
        name: dataclasses.replace(
            router, experts=dataclasses.replace(router.experts, kind=kind), routing=routing
        )
        for name, (kind, routing) in methods().items()
    }


def main():
    form = "d_model x n_experts x top_k x d_ffn, such as 128x8x2x256"
    shapes = parse_shapes(_SHAPES.value, form)
    if _TUNIX.value:
        _import_tunix()
    print(machine_in_words())
    found = []
    for shape in shapes:
        arms = layers(shape)
        programs, calls, figures = ({name: arm[i] for name, arm in arms.items()} for i in range(3))
        seconds = medians(calls, _REPEATS.value)
        title = f"layer d={shape[0]} {shape[2]} of {shape[1]} f={shape[3]}"
        found += _report_arms(title, seconds, programs, figures)
    if _MODEL.value:
        configs = model_configs()
        steps = {name: RepeatedStep(config) for name, config in configs.items()}
        seconds = medians(steps, _REPEATS.value)
        figures = {}
        for name, config in configs.items():
            n_layers, metrics = config.model.n_layers, steps[name]()
            figures[name] = {
                "computed": _computed(config, training_flops_per_token(config), n_layers)
            }
            if "dropped_share" in metrics:
                figures[name]["dropped"] = float(metrics["dropped_share"].mean())
        found += _report_arms(
            "step of tiny.py",
            seconds,
            {name: step.program for name, step in steps.items()},
            figures,
        )
    report(found)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
