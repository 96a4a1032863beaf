"""Times a whole training step of AoE and of a router MoE with equally many parameters.

`python -m benchmarks.step [--models=tiny,deep,sparse] [--repeats=7] [--json=FILE]`. `useful FLOPs`
is the ratio of the useful FLOPs of an AoE step to those of the router MoE; `over` is the measured
ratio of step times divided by this ratio. Tokens are random; all arms are timed in turn.
"""

import dataclasses

from absl import flags

from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.timing import (
    check_names,
    configuration,
    machine_in_words,
    medians,
    report,
    run_benchmark,
)

# Changes to configs/tiny.py:published; d_low is d_model divided by each number in `RANKS`.
MODELS = {
    "tiny": {},
    "deep": {
        "model": {"n_layers": 12, "d_model": 256},
        "experts": {"d_ffn": 512},
        "train": {"batch_size": 4},
    },
    "sparse": {
        "model": {"d_model": 192},
        "experts": {"n_experts": 64, "top_k": 8, "d_ffn": 96},
        "train": {"batch_size": 16},
    },
}
RANKS = {"tiny": (3,), "deep": (3,), "sparse": (3, 12)}  # d_model / d_low
EIGHTH = {"aux_tokens": 0.125}
WHOLE_GATES = {
    "norm of 16": {"experts": {"score_neurons": 16}, "balance": EIGHTH},
    "one neuron": {"experts": {"score_neurons": 1, "score": "max"}, "balance": EIGHTH},
}
# AoE with factorised gates is balanced without a loss, or by L_aux of an eighth or of all tokens.
FACTORISED = {
    "loss-free": {"balance": {"aux_weight": 0.0, "bias_rate": 0.01}},
    "L_aux of 1/8": {"balance": EIGHTH},
    "as published": {"experts": {"score_gradient": "dense"}, "balance": {"aux_tokens": 1.0}},
}


def arms_of(name):
    """Returns `{label: Config}` of the arms of a model; the router MoE is the first one."""
    router = configuration("router", MODELS[name], {"balance": {"aux_tokens": 1.0}})
    arms = {"router": router}
    for arm, changes in WHOLE_GATES.items():
        arms[f"whole gates, {arm}"] = configuration("aoe", MODELS[name], changes)
    for rank in RANKS[name]:
        low = {"experts": {"d_low": round(router.model.d_model / rank)}}
        for arm, changes in FACTORISED.items():
            arms[f"r=d/{rank}, {arm}"] = configuration("aoe", MODELS[name], low, changes)
    return arms


def main():
    check_names("models", flags.FLAGS.models, MODELS)
    print(machine_in_words())
    figures = []
    for name in flags.FLAGS.models:
        configs = arms_of(name)
        steps = {arm: RepeatedStep(config) for arm, config in configs.items()}
        seconds, router = medians(steps, flags.FLAGS.repeats), configs["router"]
        for arm, config in configs.items():
            figure = {
                "model": name,
                "arm": arm,
                "ms": 1e3 * seconds[arm],
                "tokens_per_second": config.tokens_per_step / seconds[arm],
                "ratio": seconds[arm] / seconds["router"],
                "useful_ratio": training_flops_per_token(config) / training_flops_per_token(router),
                "temp_ratio": steps[arm].memory["temporary_bytes"]
                / steps["router"].memory["temporary_bytes"],
                "configuration": dataclasses.asdict(config.experts),
            }
            figures.append(figure)
            print(
                f"{name:>6} {arm:>23}: {figure['ms']:7.0f} ms, "
                f"{figure['tokens_per_second']:7,.0f} tokens/s, {figure['ratio']:.3f}x router "
                f"(useful FLOPs {figure['useful_ratio']:.3f}x, "
                f"over {figure['ratio'] / figure['useful_ratio']:.3f}), "
                f"temporary memory {figure['temp_ratio']:.2f}x",
                flush=True,
            )
    report(figures)


if __name__ == "__main__":  # defined here, because tests import this file
    flags.DEFINE_list("models", list(MODELS), f"some of {', '.join(MODELS)}")
    flags.DEFINE_integer("repeats", 7, "timed steps of each model", lower_bound=1)
    run_benchmark(main, timed=True)
