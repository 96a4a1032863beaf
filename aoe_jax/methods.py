"""The configuration groups of methods that have settings of their own: a group bears the name of its method.

A method is a selection of experts, `experts/selection/NAME.py`, or a kind of layer, `experts/NAME.py`. A group is left at
its defaults where the method isn't chosen.
"""

import dataclasses
from dataclasses import dataclass

from aoe_jax.checks import require, require_choice, require_not_negative


@dataclass(frozen=True)
class ThresholdConfig:
    """Expert Threshold routing; `experts.top_k` is the mean number of experts per token that thresholds aim at."""

    decay: float = 0.999  # of the moving average that is an expert's threshold
    warmup_steps: int = 4000  # steps at the beginning in which experts choose tokens, which is not causal
    # sigmoid: of the scores | relative: of scores less thresholds, for norms, which are never negative.
    weights: str = "sigmoid"

    def __post_init__(self):
        require(0 <= self.decay < 1, "threshold.decay", self.decay, "must be at least 0 and below 1")
        require_not_negative("threshold", self, "warmup_steps")
        require_choice("threshold.weights", self.weights, ("sigmoid", "relative"))


@dataclass(frozen=True)
class UoEConfig:
    """Union-of-Experts-style layers, `experts.kind="uoe"`: whole experts whose first neurons score them."""

    routing_neurons: int | None = None  # of an expert; None: round(experts.d_ffn / experts.top_k)

    def filled_in(self, d_ffn, top_k):
        """With a number for None.

        Raises:
          UserError: no neuron is left for the one part or the other.
        """
        neurons = round(d_ffn / top_k) if self.routing_neurons is None else self.routing_neurons
        wanted = f"must be at least 1 and below experts.d_ffn={d_ffn}"
        if self.routing_neurons is None:
            wanted = f"comes to {neurons} for experts.top_k={top_k}; it {wanted}"
        require(0 < neurons < d_ffn, "uoe.routing_neurons", self.routing_neurons, wanted)
        return dataclasses.replace(self, routing_neurons=neurons)


METHODS = {"threshold": ThresholdConfig, "uoe": UoEConfig}
