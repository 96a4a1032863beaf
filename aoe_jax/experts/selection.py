"""The select station: from scores `[T, n]` (norms or logits, it doesn't matter which) to an `Assignment`.

T tokens, n experts, K chosen per token, C tokens per expert, P slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Recomputing a top-k in the backward pass may break ties the other way: rematerialisation keeps what bears this name. The
# scores bear it too: they are [T, n] only, and keeping them saves scoring again.
SELECTION = "selection"


class Assignment(NamedTuple):
    """Which expert processes which token, and with what weight, as P flat slots.

    An unused slot has expert number n and weight 0. Token-choice methods lay their slots out token by token, an equal
    number for each (`slots_per_token`); `None` says that the order is arbitrary.
    """

    token: jax.Array  # [P] int32
    expert: jax.Array  # [P] int32
    weight: jax.Array  # [P] float32
    slots_per_token: int | None


def _by_token(expert, weight):
    """An assignment from `expert [T, k]` and `weight [T, k]`."""
    n_tokens, k = expert.shape
    token = jnp.repeat(jnp.arange(n_tokens, dtype=jnp.int32), k)
    return Assignment(token, expert.reshape(-1), weight.reshape(-1), k)


def top_k(scores, k, gate="chosen", bias=None, jitter=0.01):
    """Token choice: each token goes to the `k` experts of highest score; ties go to the lower expert number.

    Args:
      scores: `[T, n]` float32.
      k: experts per token.
      gate: weights are the softmax over the `"chosen"` scores (Algorithms 1 and 2), or over `"all"` n scores and not
        renormalised (the authors' released code), or those of `sparsemixer_weights`.
      bias: `[n]`, added to the scores for the choice, not for the weights: loss-free balancing (Wang et al. 2024, arXiv
        2408.15664), see `balance.updated_bias`. None: no bias.
      jitter: of `sparsemixer_weights`.

    Returns:
      An `Assignment` with `P = T k`.
    """
    expert = checkpoint_name(_by_rank(scores, bias, k), SELECTION)
    if gate == "all":
        weight = jnp.take_along_axis(jax.nn.softmax(scores), expert, axis=1)
    elif gate == "sparsemixer":
        weight = sparsemixer_weights(scores, expert, jitter)
    else:
        weight = jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1))
    return _by_token(expert, weight)


def ranked(scores, ranks, bias=None):
    """Token choice by rank: each token goes to the experts whose scores have these ranks, weighed by the softmax over them.

    Ranks from 0 to k - 1 are `top_k` of k with `gate="chosen"`; a single one has weight 1, whichever it is.

    Args:
      scores: `[T, n]` float32.
      ranks: different numbers from 0, the highest score, to n - 1; of equal scores the lower expert number comes first.
      bias: as in `top_k`.

    Returns:
      An `Assignment` with `P = T len(ranks)`.
    """
    by_rank = _by_rank(scores, bias, max(ranks) + 1)
    expert = checkpoint_name(jnp.stack([by_rank[:, rank] for rank in ranks], axis=1), SELECTION)
    return _by_token(expert, jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1)))


def _by_rank(scores, bias, k):
    """The numbers of the k experts of highest score, `[T, k]` int32."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores if bias is None else scores + bias), k)[1]


def sparsemixer_weights(scores, expert, jitter):
    """The weights of the chosen experts `[T, k]` by SparseMixer-v2 as used once trained (GRIN, arXiv 2409.12136).

    The i-th expert is weighed by the softmax over the scores that were left when it was chosen and lie near its own: below
    it by at most `2 jitter` of the larger of the two in size. Its training, which samples, is not part of it.

    Args:
      scores: `[T, n]` float32.
      expert: `[T, k]` int32, the experts by falling score.
      jitter: see above.
    """
    n_experts, weights = scores.shape[1], []
    left = scores
    for chosen in expert.T:
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)
        # Where both are zero, 0 / 0 is not far.
        is_far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * jitter
        probability = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left))
        weights.append(jnp.take_along_axis(probability, chosen[:, None], axis=1))
        left = jnp.where(chosen[:, None] == jnp.arange(n_experts), -jnp.inf, left)
    return jnp.concatenate(weights, axis=1)


def weigh_chosen(assignment, scores):
    """The same choice with weights from other scores: the softmax over each token's slots of `scores [P]`."""
    weight = jax.nn.softmax(scores.reshape(-1, assignment.slots_per_token))
    return assignment._replace(weight=weight.reshape(-1))


def top_p(scores, threshold):
    """Token choice of uneven size (Huang et al. 2024, arXiv 2403.07652): the most probable experts whose sum passes p.

    The expert that crosses the threshold is included. Weights are the softmax values themselves, not renormalised.
    `scores [T, n]` -> an `Assignment` with `P = T n`, most slots of it unused.
    """
    n_experts = scores.shape[1]
    probability = jax.nn.softmax(scores)
    values, expert = jax.lax.top_k(jax.lax.stop_gradient(probability), n_experts)
    chosen = jnp.cumsum(values, axis=1) - values <= threshold
    expert = checkpoint_name(jnp.where(chosen, expert, n_experts), SELECTION)
    weight = jnp.take_along_axis(probability, expert, axis=1, mode="fill", fill_value=0)
    return _by_token(expert, weight)


def expert_choice(scores, capacity_factor, token_weights=None):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes the `C` tokens that rate it highest.

    NOT CAUSAL: whether a token is taken depends on every other token of the batch, later ones included, so a causal
    language model trained with it sees the future. Its training loss is not comparable with token-choice losses.

    Args:
      scores: `[T, n]` float32.
      capacity_factor: mean number of experts per token; `C = T capacity_factor / n`, rounded up.
      token_weights: `[T]`, 0 for padding, which takes no place from other tokens; None: all count.

    Returns:
      An `Assignment` with `P = n C`; weights are the softmax values over experts, not renormalised.
    """
    probability = jax.nn.softmax(scores)
    token, real = _expert_choice(probability, capacity_factor, token_weights)
    weight = jnp.where(real, jnp.take_along_axis(probability.T, token, axis=1), 0)
    expert = jnp.where(real, jnp.arange(scores.shape[1], dtype=jnp.int32)[:, None], scores.shape[1])
    return Assignment(token.reshape(-1), expert.reshape(-1), weight.reshape(-1), None)


def _expert_choice(probability, capacity_factor, token_weights):
    """The tokens that each expert takes, `[n, C]` int32, and which of them are no padding, bool."""
    n_tokens, n_experts = probability.shape
    capacity = expert_capacity(n_tokens, n_experts, capacity_factor)
    real = jnp.ones(n_tokens, bool) if token_weights is None else token_weights > 0
    ranked = jnp.where(real, jax.lax.stop_gradient(probability).T, -1)
    token = checkpoint_name(jax.lax.top_k(ranked, capacity)[1], SELECTION)
    return token, real[token]


def expert_choice_among(scores, capacity_factor, token_weights, all_tokens, own):
    """Expert choice over a batch of which this device owns some tokens; not causal, see `expert_choice`.

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
    expert = jnp.where(chosen, jnp.arange(n_experts, dtype=jnp.int32), n_experts)
    return _by_token(expert, jnp.where(chosen, probability, 0))


def expert_capacity(n_tokens, n_experts, capacity_factor):
    """Tokens that each expert takes under expert choice, `ceil(T capacity_factor / n)` and at most T."""
    return min(n_tokens, -int(-n_tokens * capacity_factor // n_experts))
