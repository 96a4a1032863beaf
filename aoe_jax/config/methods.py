"""The configuration groups of methods that have settings of their own: a group bears the name of
its method.

A method is a selection of experts, `experts/selection/NAME.py`, or a kind of layer,
`experts/NAME.py`. A group is left at its defaults where the method isn't chosen.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from aoe_jax.config.checks import require, require_choice, require_not_negative, require_positive


def training_only(default):
    """A field that says how a model is trained and nothing of what it computes."""
    return field(default=default, metadata={"training_only": True})


class MethodConfig:
    """What the groups share."""

    def filled_in(self, experts):
        """With a number for every None that stands for one, which the group `experts` decides."""
        return self

    def check(self, config):
        """Refuses what doesn't fit the other groups, where the method is chosen."""

    @property
    def least_seq_len(self):
        """Tokens that a sequence has at least."""
        return 1


def _refuse_losses_of_load(config):
    for name in ("aux_weight", "entropy_weight", "z_weight"):
        value = getattr(config.balance, name)
        with_own = f"isn't tried beside what selection {config.experts.selection} has for its load; set it to 0"
        require(value == 0, f"balance.{name}", value, with_own)


@dataclass(frozen=True)
class ThresholdConfig(MethodConfig):
    """Expert Threshold routing; `experts.top_k` is the mean number of experts per token that
    thresholds aim at.
    """

    decay: float = training_only(0.999)  # of the moving average that is an expert's threshold
    # Steps at the beginning in which experts choose tokens, which is not causal.
    warmup_steps: int = training_only(4000)
    # sigmoid: of the scores | relative: of scores less thresholds, for norms, which are never
    # negative.
    weights: str = "sigmoid"

    def __post_init__(self):
        require(
            0 <= self.decay < 1, "threshold.decay", self.decay, "must be at least 0 and below 1"
        )
        require_not_negative("threshold", self, "warmup_steps")
        require_choice("threshold.weights", self.weights, ("sigmoid", "relative"))


@dataclass(frozen=True)
class UoEConfig(MethodConfig):
    """Union-of-Experts-style layers, `experts.kind="uoe"`: whole experts whose first neurons score
    them.
    """

    routing_neurons: int | None = None  # of an expert; None: round(experts.d_ffn / experts.top_k)

    def filled_in(self, experts):
        """With a number of neurons.

        Raises:
          UserError: no neuron is left for the one part or the other.
        """
        d_ffn, top_k = experts.d_ffn, experts.top_k
        neurons = round(d_ffn / top_k) if self.routing_neurons is None else self.routing_neurons
        wanted = f"must be at least 1 and below experts.d_ffn={d_ffn}"
        if self.routing_neurons is None:
            wanted = f"comes to {neurons} for experts.top_k={top_k}; it {wanted}"
        require(0 < neurons < d_ffn, "uoe.routing_neurons", self.routing_neurons, wanted)
        return dataclasses.replace(self, routing_neurons=neurons)

    def check(self, config):
        """Refuses what isn't tested."""
        balance, tensor = config.balance, config.mesh.tensor
        untested = "with experts.kind='uoe' isn't tested; leave it at its default"
        require(balance.z_weight == 0, "balance.z_weight", balance.z_weight, untested)
        require(balance.aux_batch == "global", "balance.aux_batch", balance.aux_batch, untested)
        neurons = self.routing_neurons
        require(
            neurons % tensor == 0,
            "mesh.tensor",
            tensor,
            f"must divide uoe.routing_neurons={neurons}",
        )


@dataclass(frozen=True)
class TopAnyConfig(MethodConfig):
    """DynMoE; `experts.n_experts` is the size of the pool, the most experts that a layer can have."""

    temperature: float = 1.0  # tau, of scores and thresholds
    loss_weight: float = training_only(0.01)  # of the loss on a router's columns; AoE has none
    balance_weight: float = training_only(
        0.0
    )  # of gates' balance, which the authors' code has and the paper hasn't
    efficiency_weight: float = training_only(0.0)  # of the mean of all gates, likewise
    initial_experts: int | None = training_only(
        None
    )  # live from the first step; None: as many as the pool holds
    # Of every so many steps, that many pass, then that many are recorded, and experts are removed
    # and added.
    period_steps: int = training_only(900)
    idle_steps: int = training_only(300)
    record_steps: int = training_only(300)  # 0: the experts stay the same

    def __post_init__(self):
        require_positive("top_any", self, "temperature", "period_steps")
        weights = "loss_weight", "balance_weight", "efficiency_weight"
        require_not_negative("top_any", self, *weights, "idle_steps", "record_steps")
        require(
            self.initial_experts is None or self.initial_experts > 0,
            "top_any.initial_experts",
            self.initial_experts,
            "must be greater than 0, or None",
        )
        require(
            self.idle_steps + self.record_steps <= self.period_steps,
            "top_any.period_steps",
            self.period_steps,
            f"must be at least idle_steps + record_steps = {self.idle_steps + self.record_steps}",
        )

    def check(self, config):
        """Refuses what doesn't fit the layer, and other losses."""
        _refuse_losses_of_load(config)
        n = config.experts.n_experts
        require(
            self.initial_experts is None or self.initial_experts <= n,
            "top_any.initial_experts",
            self.initial_experts,
            f"can't be greater than the pool, experts.n_experts={n}",
        )
        require(
            config.experts.has_router or self.loss_weight == type(self).loss_weight,
            "top_any.loss_weight",
            self.loss_weight,
            "belongs to experts.kind='router'; leave it at its default",
        )
        require(
            not config.experts.large_router,
            "experts.large_router",
            True,
            "isn't implemented for selection top_any, which compares tokens with the columns of the router",
        )


@dataclass(frozen=True)
class RoutingFreeConfig(MethodConfig):
    """Routing-Free MoE; `experts.top_k` is the mean number of experts per token and layer that its
    loss aims at.
    """

    threshold: float = 1.0  # theta
    bias: float = training_only(1e-6)  # the b that experts start from
    multiplier: float = training_only(1e-10)  # the lambda that training starts from, at most 1
    rate: float = training_only(0.02)  # eta: how fast lambda changes
    # mu: of the loss, the part that balances experts; the rest balances tokens.
    expert_share: float = training_only(0.5)

    def __post_init__(self):
        require_not_negative("routing_free", self, "threshold", "rate", "expert_share")
        require(math.isfinite(self.bias), "routing_free.bias", self.bias, "must be finite")
        require(
            0 < self.multiplier <= 1,
            "routing_free.multiplier",
            self.multiplier,
            "must lie above 0, at most at 1",
        )
        require(
            self.expert_share <= 1,
            "routing_free.expert_share",
            self.expert_share,
            "must lie between 0 and 1",
        )

    def check(self, config):
        """Refuses other losses."""
        _refuse_losses_of_load(config)


@dataclass(frozen=True)
class GShardConfig(MethodConfig):
    """GShard's two experts per token; experts.top_k must be 2."""

    aux_weight: float = training_only(
        0.01
    )  # of its balance loss of first choices, which is 1 in perfect balance

    def __post_init__(self):
        require_not_negative("gshard", self, "aux_weight")

    def check(self, config):
        """Refuses L_aux, another loss of the same load."""
        weight, counts_both = config.balance.aux_weight, "counts both choices; selection gshard has"
        require(
            weight == 0,
            "balance.aux_weight",
            weight,
            f"{counts_both} gshard.aux_weight, of the first; set it to 0",
        )


@dataclass(frozen=True)
class ByAttentionConfig(MethodConfig):
    """Experts per token from attention, at most `experts.top_k`."""

    # How important a token is. paid: how much of its attention it pays to one token | received: how
    # much it receives.
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


@dataclass(frozen=True)
class SmearConfig(MethodConfig):
    """SMEAR: experts are merged, one merged expert for a sequence or a segment of it."""

    # Tokens that share a merged expert, which the segment before them decides. 0: the whole
    # sequence, by its own mean, which isn't causal.
    segment: int = 64
    expert_dropout: float = training_only(
        0.1
    )  # chance of an expert to be left out of a merged one, in training
    # Of the variance of an expert's matrices at first, what isn't common to all experts.
    own_share: float = training_only(0.5)

    def __post_init__(self):
        require(
            self.segment == 0 or self.segment > 1,
            "smear.segment",
            self.segment,
            "must be at least 2, for experts aren't merged for every token, or 0 for a whole sequence",
        )
        require(
            0 <= self.expert_dropout < 1,
            "smear.expert_dropout",
            self.expert_dropout,
            "must be at least 0 and below 1",
        )
        require(
            0 < self.own_share <= 1,
            "smear.own_share",
            self.own_share,
            "must be above 0 and at most 1",
        )

    @property
    def least_seq_len(self):
        """That of two segments, of which the first decides for the second."""
        return self.segment + 1

    def check(self, config):
        """Refuses what a decoder can't have, and sequences of one segment, whose merged expert
        nothing decides.
        """
        length = config.data.seq_len
        require(
            self.segment > 0,
            "smear.segment",
            self.segment,
            "merges by the mean of a whole sequence, which in a decoder knows later tokens; name the tokens of a segment",
        )
        require(
            self.least_seq_len <= length,
            "smear.segment",
            self.segment,
            f"must be below data.seq_len={length}, so that there are two segments: the first decides for the second",
        )
        require(
            not config.data.document_mask,
            "data.document_mask",
            True,
            "with experts.kind='smear' isn't implemented: a segment knows no documents, and would tell one of another",
        )


@dataclass(frozen=True)
class ThorConfig(MethodConfig):
    """THOR: one expert a layer is drawn for a batch, and two passes are trained to agree."""

    consistency_weight: float = training_only(
        5.0
    )  # alpha, of the symmetric KL divergence between the passes
    inference: str = "sequence"  # sequence | token: what draws an expert, once the model is trained
    inference_seed: int = 0  # of these draws

    def __post_init__(self):
        require_not_negative("thor", self, "consistency_weight", "inference_seed")
        require_choice("thor.inference", self.inference, ("sequence", "token"))


METHODS = {
    "threshold": ThresholdConfig,
    "uoe": UoEConfig,
    "top_any": TopAnyConfig,
    "routing_free": RoutingFreeConfig,
    "gshard": GShardConfig,
    "by_attention": ByAttentionConfig,
    "smear": SmearConfig,
    "thor": ThorConfig,
}
