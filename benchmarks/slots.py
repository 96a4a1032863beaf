"""The cost of unused slots: top-k in the layout of routers that give a token any number of experts.

`python -m benchmarks.slots [--models=tiny,small] [--repeats=15] [--json=FILE]`. Top-p, Expert
Threshold, DynMoE and Routing-Free have n slots per token, and on AoE all their norms carry a
gradient. Here top-k does the same with its own experts and weights: a training step with K slots,
with `score_gradient="dense"`, and with n slots. Tokens are random; the arms of a kind are timed in
turn.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from absl import flags

from aoe_jax.moe.routing import Choice, TopK, by_mask
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.timing import (
    check_names,
    configuration,
    machine_in_words,
    medians,
    report,
    run_benchmark,
)
from configs.compare.small import SMALLEST

# Changes to configs/tiny.py; the smallest size of the comparisons.
MODELS = {"tiny": {}, "small": SMALLEST | {"model": SMALLEST["model"] | {"vocab_size": 1024}}}
DENSE = {"experts": {"score_gradient": "dense"}}


@dataclass(frozen=True)
class AllSlots(TopK):
    """`TopK` in the layout of routers that give a token any number of experts."""

    def choice(self, experts):
        return Choice()

    def __call__(self, scores, weights, ctx):
        """The experts and weights of `TopK`, with n slots per token."""
        routing = super().__call__(scores, weights, ctx)
        expert, weight = (a.reshape(-1, ctx.top_k, 1) for a in (routing.expert, routing.weight))
        is_expert = expert == jnp.arange(scores.shape[1])
        return by_mask(is_expert.any(axis=1), jnp.where(is_expert, weight, 0).sum(axis=1))


def steps_of(model, kind):
    """The arms, K slots first: name -> `RepeatedStep`."""
    variant, changes = {"router": ("moe", {}), "aoe": ("aoe", DENSE)}[kind]
    steps = {"K slots": RepeatedStep(configuration(variant, MODELS[model]))}
    config = configuration(variant, MODELS[model], changes)
    if changes:
        steps["K slots, all norms' gradients"] = RepeatedStep(config)
    steps["n slots"] = RepeatedStep(replace(config, routing=AllSlots()))
    return steps


def main():
    check_names("models", flags.FLAGS.models, MODELS)
    print(machine_in_words())
    figures = []
    for model in flags.FLAGS.models:
        for kind in ("router", "aoe"):
            steps = steps_of(model, kind)
            seconds = medians(steps, flags.FLAGS.repeats)
            for arm, step in steps.items():
                memory = step.memory["temporary_bytes"] / steps["K slots"].memory["temporary_bytes"]
                figure = {"model": model, "kind": kind, "arm": arm, "ms": 1e3 * seconds[arm]}
                figure |= {"ratio": seconds[arm] / seconds["K slots"], "temp_ratio": memory}
                figures.append(figure)
                print(
                    f"{model:>6} {kind:>6} {arm:>29}: {figure['ms']:6.1f} ms, "
                    f"{figure['ratio']:.2f}x, temporary memory {memory:.2f}x",
                    flush=True,
                )
    report(figures)


if __name__ == "__main__":  # only here, so that tests can import this beside other commands
    flags.DEFINE_list("models", list(MODELS), f"of {', '.join(MODELS)}")
    flags.DEFINE_integer("repeats", 15, "timed steps of each arm", lower_bound=1)
    run_benchmark(main, timed=True)
