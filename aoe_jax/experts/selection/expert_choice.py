"""Expert choice: experts choose tokens. Not causal.

T tokens of the batch, t of this device, n experts, C tokens per expert.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, Assignment, by_mask
from aoe_jax.experts.selection.base import Choice, Selection


def expert_choice(scores, capacity_factor, token_weights=None):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes the `C` tokens that
    rate it highest.

    NOT CAUSAL: whether a token is taken depends on every other token of the batch, later ones
      included, so a causal
    language model trained with it sees the future. Its training loss is not comparable with
    token-choice losses.

    Args:
      scores: `[T, n]` float32.
      capacity_factor: mean number of experts per token; `C = T capacity_factor / n`, rounded up.
      token_weights: `[T]`, 0 for padding, which counts in nothing: without it, C is of the real
        tokens; None: all count.

    Returns:
      An `Assignment` with `P = n C`; weights are the softmax values over experts, not renormalised.
    """
    probability = jax.nn.softmax(scores)
    token, real = _expert_choice(probability, capacity_factor, token_weights)
    weight = jnp.where(real, jnp.take_along_axis(probability.T, token, axis=1), 0)
    expert = jnp.where(real, jnp.arange(scores.shape[1], dtype=jnp.int32)[:, None], scores.shape[1])
    return Assignment(token.reshape(-1), expert.reshape(-1), weight.reshape(-1), None)


def _expert_choice(probability, capacity_factor, token_weights):
    """The tokens that each expert takes, `[n, C]` int32, and which it really does, bool: with
    padding fewer than C.
    """
    n_tokens, n_experts = probability.shape
    capacity = expert_capacity(n_tokens, n_experts, capacity_factor)
    real = jnp.ones(n_tokens, bool) if token_weights is None else token_weights > 0
    ranked = jnp.where(real, jax.lax.stop_gradient(probability).T, -1)
    token = checkpoint_name(jax.lax.top_k(ranked, capacity)[1], SELECTION)
    among_real = jnp.ceil(real.sum() * capacity_factor / n_experts)
    return token, real[token] & (jnp.arange(capacity) < among_real)


def expert_choice_among(scores, capacity_factor, token_weights, all_tokens, own):
    """Expert choice over a batch of which this device owns some tokens; not causal, see
    `expert_choice`.

    Args:
      scores: `[t, n]` float32, of the tokens of this device.
      capacity_factor: as in `expert_choice`.
      token_weights: `[t]`.
      all_tokens: `[t, ...] -> [T, ...]`, what all devices have of the whole batch, in its order.
      own: `[T, ...] -> [t, ...]`, back.

    Returns:
      An `Assignment` of the tokens of this device, with `P = t n`, most slots of it unused.
    """
    probability = jax.nn.softmax(scores)
    n_experts = scores.shape[1]
    gathered = all_tokens(jax.lax.stop_gradient(probability))
    token, real = _expert_choice(gathered, capacity_factor, all_tokens(token_weights))
    expert = jnp.broadcast_to(jnp.arange(n_experts, dtype=jnp.int32)[:, None], token.shape)
    chosen = own(jnp.zeros(gathered.shape, bool).at[token, expert].set(real))
    return by_mask(chosen, probability)


def expert_capacity(n_tokens, n_experts, capacity_factor):
    """Tokens that each expert has room for, `ceil(T capacity_factor / n)`; at most T, for none gets
    a token twice.
    """
    return min(n_tokens, -int(-n_tokens * capacity_factor // n_experts))


class ExpertChoice(Selection):
    """`experts.selection="expert_choice"`."""

    causal = False
    balances_by = "expert choice"
    not_causal_because = (
        "which tokens an expert takes depends on all tokens of the batch, later ones included"
    )

    def experts_per_token(self, experts):
        """The capacity factor."""
        return experts.capacity_factor

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        factor, devices = experts.capacity_factor, given.devices
        if devices.total_size == 1:
            return Choice(expert_choice(scores, factor, given.token_weights))
        among = devices.all_tokens, devices.own_tokens
        return Choice(expert_choice_among(scores, factor, given.token_weights, *among))
