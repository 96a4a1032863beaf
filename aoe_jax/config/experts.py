"""The groups `experts` (kind, number and size) and `balance` (losses that balance the load)."""

import dataclasses
import math
from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting
from aoe_jax.moe.routing import state_shapes

_USUAL = ("aoe", "router")
LOSSES = ("aux_weight", "entropy_weight", "z_weight")


@dataclass(frozen=True)
class ExpertsConfig(Group):
    """The experts of a layer. The group `routing` configures how tokens choose experts."""

    group = "experts"

    kind: str = "aoe"  # aoe | router | a layer of `aoe_jax/methods/`, such as dense
    n_experts: int = setting(8, above=0)  # experts of a layer (n)
    # Number of experts per token (K). Routers with a varying number document how they use it.
    top_k: int = setting(2, above=0, at_most="n_experts")
    d_ffn: int = setting(512, above=0)  # width of a traditional expert or of the dense layer (f)
    d_low: int | None = setting(None, above=0)  # rank of a factorised gate (r); None: d_model // 3
    # None: gates are factorised, and scores are computed from their low-rank activations (the
    # paper). A number s: gates are whole; scores are computed from their first s pre-activations.
    score_neurons: int | None = setting(None, kinds=("aoe",), above=0, at_most="d_ffn")
    # norm: a score is the L2 norm of an expert's scoring activations; max: the largest of them.
    score: str = setting("norm", choices=("norm", "max"), kinds=("aoe",))
    d_wide: int | None = setting(None, above=0)  # expert width with a factorised gate; None: Eq. 5
    round_to: int = setting(1, above=0)  # the width by Eq. 5 is rounded to a multiple of this
    # sparse: only scores of chosen experts have a gradient, and only their activations are kept.
    # If there is a balance loss, all scores of the tokens that it uses have a gradient from it. The
    # gradient of `sparse` is exact if weights are the softmax over the chosen scores.
    # dense: all scores have a gradient, and the activations of all experts are kept (the paper).
    # None: sparse if its gradient is exact, else dense.
    score_gradient: str | None = setting(None, choices=(None, "sparse", "dense"), kinds=("aoe",))
    # Whether W_gate is a product W_gate_down W_gate_up in each expert. With kind="router" this is
    # the ablation of Table 2, row 3; with "smear" or "thor" the experts are those of AoE.
    factorised_gate: bool = setting(False, kinds=("router", "smear", "thor"))
    # dtype in which gradients of experts are summed over fsdp; bfloat16 sends half the bytes.
    gradient_sums: str = setting("float32", choices=("float32", "bfloat16"), kinds=_USUAL)
    # The backend of `moe/grouped_matmul/`; auto: by device, dtype and number of rows.
    grouped_matmul: str = setting("auto", choices=("auto", "blocked"))
    # Width of a shared expert, which every token uses in addition to the chosen ones; 0: none.
    d_shared: int = setting(0, kinds=_USUAL, at_least=0)
    shared_gate: bool = False  # multiply the shared expert's output by sigmoid(x w) (Qwen2-MoE)
    # Whether the router has a hidden layer and about n r d parameters (Table 2, row 4).
    large_router: bool = setting(False, kinds=("router",))

    def __post_init__(self):
        super().__post_init__()
        if not self.low_rank:
            only = "is for experts with a factorised gate; set the width with experts.d_ffn"
            if self.d_wide is not None:
                self.refuse("d_wide", only)
            if self.round_to > 1:
                self.refuse("round_to", only)
        if self.round_to > 1 and self.d_wide is not None:
            self.refuse("round_to", "rounds the width of Eq. 5; leave experts.d_wide at None")
        if self.shared_gate and not self.d_shared:
            self.refuse("shared_gate", "scales a shared expert; set its width, experts.d_shared")
        if self.large_router and self.factorised_gate:
            wanted = "is an ablation of its own; set experts.factorised_gate=False"
            self.refuse("large_router", wanted)
        for field in dataclasses.fields(self):
            kinds = field.metadata.get("kinds")
            if kinds and self.kind not in kinds and getattr(self, field.name) != field.default:
                only = f"is for experts.kind={' or '.join(map(repr, kinds))}"
                self.refuse(field.name, f"{only}; leave it at {field.default}")

    def check(self, config):
        d_model = config.model.d_model
        self.sparse_scoring(config.routing)  # refuses a score_gradient that does not fit
        rank = self.rank(d_model)
        if self.low_rank and rank >= d_model:
            wanted = f"must be smaller than model.d_model={d_model}"
            self.refuse("d_low", f"{wanted}, or the gate is no low-rank product")
        if self.width(d_model) <= 0:
            self.refuse(
                "d_ffn",
                f"Eq. 5 finds no width for d_low={rank} and round_to={self.round_to}; set a larger "
                "d_ffn, or experts.d_wide",
            )

    def sparse_scoring(self, routing):
        """Whether AoE computes all scores without a gradient, then chosen ones with a gradient.
        Raises `UserError` if `score_gradient` is "sparse" for a router that needs all gradients.
        """
        choice = routing.choice(self) if self.kind == "aoe" and not routing.hooks.scores else None
        is_exact = choice is not None and choice.is_normalised
        if self.score_gradient == "sparse" and not is_exact:
            self.refuse(
                "score_gradient",
                "is exact only where weights are the softmax over the chosen scores, as with "
                "routing.name='top_k' and norm_topk_prob=True; use 'dense'",
            )
        return is_exact and self.score_gradient != "dense"

    @property
    def has_router(self):
        """Whether the scores are the logits of a router."""
        return self.kind in ("router", "capacity")

    @property
    def low_rank(self):
        """Whether the gate of each expert is factorised into W_gate_down W_gate_up."""
        return (self.kind == "aoe" and self.score_neurons is None) or self.factorised_gate

    def rank(self, d_model):
        """Rank of a factorised gate (r)."""
        return self.d_low or max(1, d_model // 3)

    def width(self, d_model):
        """Width of an expert: `d_ffn`; with a factorised gate `d_wide` (None: width by Eq. 5)."""
        if not self.low_rank:
            return self.d_ffn
        return self.d_wide or matched_width(d_model, self.d_ffn, self.rank(d_model), self.round_to)

    def sizes(self, d_model):
        """Returns `{axis letter: size}` for the parameters of a layer."""
        d, n, r = d_model, self.n_experts, self.score_neurons or self.rank(d_model)
        hidden = max(1, round(n * r * d / (d + n)))  # a large router has about n r d parameters
        return {"d": d, "n": n, "r": r, "f": self.width(d), "m": hidden, "u": self.d_shared}


def matched_width(d_model, d_ffn, d_low, round_to=1):
    """Eq. 5: the width at which an AoE expert has as many parameters as a traditional one."""
    exact = (3 * d_model * d_ffn - d_low * d_model) / (d_low + 2 * d_model)
    return math.floor(exact / round_to + 0.5) * round_to


@dataclass(frozen=True)
class BalanceConfig(Group):
    """Weights of auxiliary losses (means over layers), and the rate of loss-free balancing."""

    group = "balance"

    aux_weight: float = setting(0.01, at_least=0)  # alpha of L_aux (Eq. 2 and 6)
    # Weight of the loss Ent_conf (Eq. 8), for top-p; Huang et al. 2024 use 1e-4.
    entropy_weight: float = setting(0.0, at_least=0)
    # Fraction of the tokens whose scores the balance losses use; it must be 1 / a whole number.
    aux_tokens: float = setting(1.0, at_least=1e-9, at_most=1)
    # The tokens over which L_aux averages the load f and the probability P. global: the batch of
    # all devices; with train.accumulate, P is averaged over one micro-batch, f over the step's
    # micro-batches so far. sequence: each sequence separately.
    aux_batch: str = setting("global", choices=("global", "sequence"))
    # Weight of the z-loss, the mean square of log sum exp of the scores; 1e-3 is usual for logits.
    z_weight: float = setting(0.0, at_least=0)
    # Loss-free balancing (Wang et al. 2024): each step changes an expert's selection bias by this
    # rate times the standard deviation of a token's scores, or by the rate itself if routing.name
    # is "sigmoid_top_k". 0: no loss-free balancing.
    bias_rate: float = setting(0.0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.aux_batch == "sequence" and self.aux_weight == 0:
            self.refuse("aux_batch", "has no effect with aux_weight=0; leave it at 'global'")
        if abs(1 / self.aux_tokens - self.aux_stride) > 1e-6:
            self.refuse("aux_tokens", "must be 1 / a whole number, such as 0.5 or 0.125")

    def check(self, config):
        method, length = config.routing, config.data.seq_len
        state = state_shapes(method, config.experts, self, config.model.d_model)
        if self.bias_rate and "selection_bias" not in state:
            wanted = f"set it to 0 with routing.name={method.name!r}"
            self.refuse("bias_rate", f"biases the choice of top-k routers; {wanted}")
        if self.aux_batch == "sequence" and length % self.aux_stride:
            wanted = f"its denominator must divide data.seq_len={length}"
            self.refuse("aux_tokens", f"with aux_batch='sequence', {wanted}")

    def refuse_losses(self, why, names=LOSSES):
        """Raises a `UserError` with the reason `why` if a loss weight in `names` is not 0."""
        for name in names:
            if getattr(self, name):
                self.refuse(name, why)

    @property
    def aux_stride(self):
        """Balance losses use the scores of every `aux_stride`-th token only."""
        return round(1 / self.aux_tokens)

    @property
    def has_loss(self):
        """Whether a loss of this group has a weight above 0, so scores get a gradient from it."""
        return self.aux_weight > 0 or self.entropy_weight > 0 or self.z_weight > 0
