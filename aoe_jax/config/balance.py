"""The group `balance`."""

from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting

LOSSES = ("aux_weight", "entropy_weight", "z_weight")


@dataclass(frozen=True)
class BalanceConfig(Group):
    """Auxiliary losses, averaged over layers and added to the negative log-likelihood, and
    loss-free balancing.
    """

    group = "balance"

    aux_weight: float = setting(0.01, at_least=0)  # alpha of L_aux (Eq. 2 and 6)
    # Weight of Ent_conf, which is minimised (for top-p; Huang et al. 2024 use 1e-4).
    entropy_weight: float = setting(0.0, at_least=0)
    # Share of the tokens, 1 / a whole number, over which the losses average the softmax.
    aux_tokens: float = setting(1.0, above=0, at_most=1)
    # What f and P of L_aux are means over. global: the batch on all devices; with train.accumulate,
    # P is of each micro-batch and f of all so far. sequence: each sequence by itself.
    aux_batch: str = setting("global", choices=("global", "sequence"))
    # Weight of the z-loss, the mean square of log sum exp of the scores; 1e-3 is usual for logits.
    z_weight: float = setting(0.0, at_least=0)
    # Loss-free balancing (Wang et al. 2024): how much a step changes an expert's selection bias, as
    # a share of the standard deviation of a token's scores over experts; 0: none.
    bias_rate: float = setting(0.0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        self.require(
            self.aux_batch == "global" or self.aux_weight > 0,
            "aux_batch",
            f"is a choice of L_aux, which balance.aux_weight={self.aux_weight} leaves out; "
            "leave it at 'global'",
        )
        self.require(
            abs(1 / self.aux_tokens - self.aux_stride) < 1e-6,
            "aux_tokens",
            "must be 1 / a whole number, such as 0.5 or 0.125",
        )

    def check(self, config):
        method = config.routing
        state = method.state_shapes(config.experts, self, config.model.d_model)
        self.require(
            self.bias_rate == 0 or "selection_bias" in state,
            "bias_rate",
            f"biases the choice of top-k routers; set it to 0 with routing.name={method.name!r}",
        )
        self.require(
            self.aux_batch == "global" or config.data.seq_len % self.aux_stride == 0,
            "aux_tokens",
            "with aux_batch='sequence', its denominator must divide "
            f"data.seq_len={config.data.seq_len}",
        )

    def refuse_losses(self, why, names=LOSSES):
        """Refuses balance losses for a method.

        Raises:
          UserError: one of the weights `names` is not 0; `why` is the method's reason.
        """
        for name in names:
            self.require(getattr(self, name) == 0, name, why)

    @property
    def aux_stride(self):
        """Every how many tokens one takes part in the balance losses."""
        return round(1 / self.aux_tokens)

    @property
    def has_loss(self):
        """Whether a balance loss sends a gradient to the scores."""
        return self.aux_weight > 0 or self.entropy_weight > 0 or self.z_weight > 0
