"""Memory and FLOPs of stacked layers of experts, forward+backward, compiled for a TPU that need not
be here.

`python -m benchmarks.memory [--generations=v5e,v5p] [--tokens=16384] [--layers=4]
[--shapes=8x2x3072x256,64x8x768x512] [--d_model=768] [--json=FILE]`, with `libtpu` installed; a
shape is n_experts, top_k, d_ffn, d_low. Layers are scanned, in bfloat16 over float32 parameters,
each `x + experts(RMSNorm(x))`, with every setting of `model.remat`.

`temp` is the compiler's temporary memory, with the arrays kept for the backward pass. `flops` are
the compiler's, over the useful ones.
"""

from absl import flags

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.model.counts import layer_flops_per_token
from benchmarks.compiling import TPUS, devices_of, lower_layers
from benchmarks.timing import parse_shapes, report, run_benchmark

NO_LOSS, EIGHTH = BalanceConfig(aux_weight=0.0), BalanceConfig(aux_tokens=0.125)


def arms(n_experts, top_k, d_ffn, d_low):
    """name -> `(ExpertsConfig, BalanceConfig)`."""
    shared = {"n_experts": n_experts, "top_k": top_k, "d_ffn": d_ffn, "d_low": d_low}
    return {
        "router": (ExpertsConfig(kind="router", **shared), BalanceConfig()),
        "AoE, whole gates": (ExpertsConfig(kind="aoe", score_neurons=16, **shared), EIGHTH),
        "AoE, loss-free": (ExpertsConfig(kind="aoe", **shared), NO_LOSS),
        "AoE, L_aux of 1/8": (ExpertsConfig(kind="aoe", **shared), EIGHTH),
        "AoE as published": (
            ExpertsConfig(kind="aoe", score_gradient="dense", **shared),
            BalanceConfig(),
        ),
    }


_GENERATIONS = flags.DEFINE_list("generations", ["v5e", "v5p"], f"of {', '.join(TPUS)}")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "tokens", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 4, "stacked layers", lower_bound=1)
_D_MODEL = flags.DEFINE_integer("d_model", 768, "model width", lower_bound=2)
_SHAPES = flags.DEFINE_list(
    "shapes", ["8x2x3072x256", "64x8x768x512"], "n_experts x top_k x d_ffn x d_low"
)


def main():
    form = "n_experts x top_k x d_ffn x d_low, such as 8x2x3072x256"
    shapes, figures = parse_shapes(_SHAPES.value, form), []
    devices = {generation: devices_of(generation)[0] for generation in _GENERATIONS.value}
    for generation, device in devices.items():
        for shape in shapes:
            temp = {}
            for arm, (experts, balance) in arms(*shape).items():
                for remat in ("none", "experts", "layer"):
                    model = ModelConfig(
                        n_layers=_LAYERS.value, n_heads=1, d_model=_D_MODEL.value, remat=remat
                    )
                    config = Config(model=model, experts=experts, balance=balance)
                    compiled = lower_layers(device, config, _TOKENS.value).compile()
                    temp[arm, remat] = compiled.memory_analysis().temp_size_in_bytes
                    # The compiler counts the body of a scan once, that is one layer.
                    useful = _TOKENS.value * layer_flops_per_token(config)[1]
                    figure = {
                        "generation": generation,
                        "shape": list(shape),
                        "arm": arm,
                        "remat": remat,
                        "temp_bytes": temp[arm, remat],
                        "flops_ratio": compiled.cost_analysis()["flops"] / useful,
                    }
                    figures.append(figure)
                    print(
                        f"{generation} {shape[1]} of {shape[0]} f={shape[2]} r={shape[3]} "
                        f"{arm:>18} remat={remat:<7}: temp {temp[arm, remat] / 1e9:5.2f} GB, "
                        f"flops {figure['flops_ratio']:.3f}x useful",
                        flush=True,
                    )
            for arm in arms(*shape):
                best = [
                    min(temp[name, remat] for remat in ("none", "experts"))
                    for name in (arm, "router")
                ]
                whole = temp[arm, "layer"] / temp["router", "layer"]
                print(
                    f"  {arm:>18} / router: {best[0] / best[1]:.2f} at best without layer, "
                    f"{whole:.2f} under layer"
                )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main)
