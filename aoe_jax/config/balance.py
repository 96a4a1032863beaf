"""The group `balance`."""

from dataclasses import dataclass

from aoe_jax.config.checks import require, require_choice, require_not_negative
from aoe_jax.config.experts import BY_SCORES_ALONE


@dataclass(frozen=True)
class BalanceConfig:
    """Auxiliary losses, each averaged over layers and added to the negative log-likelihood, and
    loss-free balancing.
    """

    aux_weight: float = 0.01  # alpha of L_aux (Eq. 2 and 6)
    entropy_weight: float = 0.0  # of Ent_conf, minimised (top-p; Huang et al. 2024 use 1e-4)
    # Fraction of the tokens, 1 / a whole number, that the softmax in the losses is averaged over.
    aux_tokens: float = 1.0
    # What f and P of L_aux are means over: the batch on all devices, of train.accumulate
    # micro-batches P of each and f of all so far; or each sequence by itself, and the losses are
    # averaged.
    aux_batch: str = "global"  # global | sequence
    # Of the z-loss, the mean square of log sum exp of the scores; 1e-3 is usual for router logits.
    z_weight: float = 0.0
    # Loss-free balancing (Wang et al. 2024): what a step adds to or takes from an expert's
    # selection bias, as a fraction of the standard deviation of a token's scores over experts; 0:
    # none.
    bias_rate: float = 0.0
    # router: of the loss that couples a router's rows to its experts, see `experts/coupling.py`
    # (the paper has 1); 0: none
    coupling_weight: float = 0.0
    coupling_alpha: float = (
        1.0  # of that loss: what share of its own excitation an expert may have from other rows
    )

    def __post_init__(self):
        require_not_negative(
            "balance", self, "aux_weight", "entropy_weight", "z_weight", "bias_rate"
        )
        require_not_negative("balance", self, "coupling_weight", "coupling_alpha")
        require(
            self.coupling_weight > 0 or self.coupling_alpha == 1,
            "balance.coupling_alpha",
            self.coupling_alpha,
            "belongs to the loss of balance.coupling_weight; set that, or leave it at 1",
        )
        require_choice("balance.aux_batch", self.aux_batch, ("global", "sequence"))
        require(
            self.aux_batch == "global" or self.aux_weight > 0,
            "balance.aux_batch",
            self.aux_batch,
            f"is of L_aux, which balance.aux_weight={self.aux_weight} leaves out; leave it at 'global'",
        )
        require(
            0 < self.aux_tokens <= 1 and abs(1 / self.aux_tokens - self.aux_stride) < 1e-6,
            "balance.aux_tokens",
            self.aux_tokens,
            "must be 1 or a whole fraction of it, such as 0.5 or 0.125",
        )

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        experts = config.experts
        for name in ("aux_weight", "entropy_weight", "z_weight", "bias_rate"):
            require(
                experts.selects or getattr(self, name) == 0,
                f"balance.{name}",
                getattr(self, name),
                f"a {experts.kind} layer has no load to balance; set it to 0",
            )
        require(
            self.bias_rate == 0 or experts.takes_k,
            "balance.bias_rate",
            self.bias_rate,
            f"biases the choice of selections top_k and ranked; leave it at 0 with {experts.selection}",
        )
        whole_gates = not experts.factorised_gate and not experts.large_router
        require(
            self.coupling_weight == 0
            or (experts.kind == "router" and experts.n_experts > 1 and whole_gates),
            "balance.coupling_weight",
            self.coupling_weight,
            "couples the rows of a plain router with whole gates, of experts.kind='router' and several experts; set 0",
        )
        require(
            self.coupling_weight == 0 or experts.selection in BY_SCORES_ALONE,
            "balance.coupling_weight",
            self.coupling_weight,
            f"isn't implemented for experts.selection={experts.selection!r}; choose one of "
            f"{', '.join(BY_SCORES_ALONE)}, or set 0",
        )
        require(
            self.aux_batch == "global" or config.data.seq_len % self.aux_stride == 0,
            "balance.aux_tokens",
            self.aux_tokens,
            f"with aux_batch='sequence', its denominator must divide data.seq_len={config.data.seq_len}",
        )

    @property
    def aux_stride(self):
        """Every how many tokens one takes part in the balance losses."""
        return round(1 / self.aux_tokens)

    @property
    def has_loss(self):
        """Whether a balance loss sends a gradient."""
        return self.aux_weight > 0 or self.entropy_weight > 0 or self.z_weight > 0
