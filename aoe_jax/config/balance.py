"""The group `balance`."""

from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting
from aoe_jax.moe.routing import state_shapes

LOSSES = ("aux_weight", "entropy_weight", "z_weight")


@dataclass(frozen=True)
class BalanceConfig(Group):
    """Weights of auxiliary losses (means over layers), and the rate of loss-free balancing."""

    group = "balance"

    aux_weight: float = setting(0.01, at_least=0)  # alpha of L_aux (Eq. 2 and 6)
    # Weight of the loss Ent_conf (Eq. 8), for top-p; Huang et al. 2024 use 1e-4.
    entropy_weight: float = setting(0.0, at_least=0)
    # Fraction of the tokens whose scores the balance losses use; it must be 1 / a whole number.
    aux_tokens: float = setting(1.0, at_least=1e-9, at_most=1)
    # The tokens over which L_aux averages f and P. global: the batch of all devices; with
    # train.accumulate, P is averaged over one micro-batch, f over the step's micro-batches so far.
    # sequence: each sequence separately.
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
