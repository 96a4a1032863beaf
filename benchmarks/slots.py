"""The cost of unused slots: top-k in the layout of routers that give a token any number of experts.

`python -m benchmarks.slots [--models=tiny,small] [--repeats=15] [--json=FILE]`. Top-p, Expert
Threshold, DynMoE and Routing-Free have n slots per token, and on AoE all their norms carry a
gradient. Here top-k does the same with its own experts and weights: a training step with K slots,
with `score_gradient="dense"`, and with n slots. Tokens are random; the arms of a kind are timed in
turn.
"""

import dataclasses

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.step_times import RepeatedStep
from benchmarks.all_slots import AllSlots
from benchmarks.timing import (
    check_names,
    configuration,
    keep_freed_memory,
    machine_in_words,
    medians,
    report,
)
from configs.compare.small import SMALLEST

# Changes to configs/tiny.py; the smallest size of the comparisons.
MODELS = {"tiny": {}, "small": SMALLEST | {"model": SMALLEST["model"] | {"vocab_size": 1024}}}
DENSE = {"experts": {"score_gradient": "dense"}}

_MODELS = flags.DEFINE_list("models", list(MODELS), f"of {', '.join(MODELS)}")
_REPEATS = flags.DEFINE_integer("repeats", 15, "timed steps of each arm", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def steps_of(model, kind):
    """The arms, K slots first: name -> `RepeatedStep`."""
    variant, changes = {"router": ("moe", {}), "aoe": ("aoe", DENSE)}[kind]
    steps = {"K slots": RepeatedStep(configuration(variant, MODELS[model]))}
    config = configuration(variant, MODELS[model], changes)
    if changes:
        steps["K slots, all norms' gradients"] = RepeatedStep(config)
    steps["n slots"] = RepeatedStep(dataclasses.replace(config, routing=AllSlots()))
    return steps


def main():
    """Times and prints an arm a line."""
    keep_freed_memory()
    check_names("models", _MODELS.value, MODELS)
    print(machine_in_words())
    figures = []
    for model in _MODELS.value:
        for kind in ("router", "aoe"):
            steps = steps_of(model, kind)
            seconds = medians(steps, _REPEATS.value)
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
    report(figures, _JSON.value)


if __name__ == "__main__":
    cli.run(main)
