"""The configuration groups of methods beside top-k, top-p and expert choice: a group bears the name of its method.

What a method does is in `experts/selection/NAME.py`; a group is left at its defaults where the method isn't chosen.
"""

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
class GShardConfig:
    """GShard's two experts per token; experts.top_k must be 2."""

    aux_weight: float = 0.01  # of its balance loss of first choices, which is 1 in perfect balance

    def __post_init__(self):
        require_not_negative("gshard", self, "aux_weight")


@dataclass(frozen=True)
class ByAttentionConfig:
    """Experts per token from attention, at most `experts.top_k`."""

    # How important a token is. paid: how much of its attention it pays to one token | received: how much it receives.
    measure: str = "paid"
    reduce: str = "mean"  # mean | max, over heads

    def __post_init__(self):
        require_choice("by_attention.measure", self.measure, ("paid", "received"))
        require(
            self.measure == "paid",
            "by_attention.measure",
            self.measure,
            "what a token receives depends on later tokens, so a decoder would see them, and can't know it when it decodes; "
            "set 'paid'",
        )
        require_choice("by_attention.reduce", self.reduce, ("mean", "max"))


METHODS = {"threshold": ThresholdConfig, "gshard": GShardConfig, "by_attention": ByAttentionConfig}
