"""The balance station: auxiliary losses and load diagnostics, from scores and assignment alone.

T tokens, n experts, L layers. All in float32. Stacked layers `[L, n]` work wherever `[n]` does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr


class LayerStats(NamedTuple):
    """What one layer of experts says about a batch; everything but the gradient of the balance
    losses stops here.
    """

    # [n], fraction of the tokens that choose each expert (f_i of Eq. 2), which it processes unless
    # it has no room for them; sums to experts per token.
    load: jax.Array
    mean_probability: (
        jax.Array
    )  # [n], mean over tokens of the softmax over all n scores (P_i of Eq. 2)
    confidence_entropy: jax.Array  # [], mean over tokens of Ent_conf (Eq. 8)
    mean_score: jax.Array  # [n], mean norm (AoE) or router logit of each expert (Fig. 4)
    score_spread: (
        jax.Array
    )  # [], mean over tokens of the standard deviation of the scores over experts
    # [], share of the choices that found no room; None where there is always room
    dropped_share: jax.Array | None = None
    coupling: jax.Array | None = (
        None  # [], the loss of `experts/coupling.py`, with its gradient; None: not computed
    )
    z_loss: jax.Array | None = None  # [], see `z_loss`; None without `balance.z_weight`
    # [], see `sequence_balance_loss`; None but in training with `balance.aux_batch="sequence"`
    sequence_loss: jax.Array | None = None
    records: dict[str, jax.Array] | None = (
        None  # of the selection method, see `selection.base.Choice`
    )
    per_token: dict[str, jax.Array] | None = None  # the same, values for every token
    # [n], 1 for a place that an expert has, 0 for one that is kept free; None: there are no free
    # ones
    live: jax.Array | None = None


def layer_stats(
    scores, balance_scores, assignment, token_weights, stride=1, total=lambda sums: sums
):
    """Statistics of one layer.

    Args:
      scores: `[T, n]` float32, norms or logits.
      balance_scores: `[ceil(T / stride), n]`, those of every `stride`-th token, with the gradient
        of the balance losses: `mean_probability` and `confidence_entropy` are means over these
        tokens.
      assignment: the `Assignment` made of the scores.
      token_weights: `[T]` float32, 1 for a token that counts and 0 for padding.
      stride: a whole number from 1, `BalanceConfig.aux_stride`.
      total: adds the sums over tokens of other devices, so that all means are over the whole batch.
    """
    scores = jax.lax.stop_gradient(scores)
    token_weights = token_weights.astype(scores.dtype)
    chosen = assignment.expert[:, None] == jnp.arange(scores.shape[1])
    load = jnp.sum(jnp.where(chosen, token_weights[assignment.token][:, None], 0), axis=0)
    log_probability = jax.nn.log_softmax(balance_scores)
    probability = jnp.exp(log_probability)
    entropy = -jnp.sum(probability * log_probability, axis=1)

    def token_sum(values, weights):
        return jnp.einsum("t,t...->...", weights, values, precision=jax.lax.Precision.HIGHEST)

    sampled_weights = token_weights[::stride]
    counts, sampled, sums = total(
        (
            (token_weights.sum(), sampled_weights.sum()),
            (token_sum(probability, sampled_weights), token_sum(entropy, sampled_weights)),
            (
                load,
                token_sum(scores, token_weights),
                token_sum(jnp.std(scores, axis=1), token_weights),
            ),
        )
    )
    n_tokens, n_sampled = (jnp.maximum(count, 1) for count in counts)
    mean_probability, confidence_entropy = (value / n_sampled for value in sampled)
    load, mean_score, score_spread = (value / n_tokens for value in sums)
    return LayerStats(load, mean_probability, confidence_entropy, mean_score, score_spread)


def z_loss(balance_scores, token_weights, total=lambda sums: sums):
    """The mean over tokens of `(log sum_i exp(score_i))^2`, `[]` (ST-MoE, Zoph et al. 2022, arXiv
    2202.08906, from memory).

    It keeps router logits small. Norms, which can't be negative, it makes smaller all together.

    Args:
      balance_scores: `[T, n]`, with a gradient.
      token_weights: `[T]`, 1 for a token that counts and 0 for padding.
      total: as in `layer_stats`.
    """
    square = jnp.square(jax.nn.logsumexp(balance_scores, axis=1))
    loss, n_tokens = total((jnp.sum(square * token_weights), token_weights.sum()))
    return loss / jnp.maximum(n_tokens, 1)


def sequence_balance_loss(
    balance_scores,
    assignment,
    token_weights,
    n_sequences,
    stride=1,
    within=lambda sums: sums,
    total=lambda sums: sums,
):
    """`balance_loss` of each sequence by itself, the mean over the sequences that have a token that
    counts, `[]`.

    What is called micro-batch balance (Qiu et al. 2025, arXiv 2501.11873), with a sequence for a
    micro-batch: unlike one of as many devices, it is the same on every mesh.

    Args:
      balance_scores: `[T / stride, n]`, those of every `stride`-th token, with a gradient. Tokens
        are laid out sequence by sequence, an equal number for each, which `stride` divides.
      assignment: the `Assignment`, of all T tokens.
      token_weights: `[T]`, 1 for a token that counts and 0 for padding.
      n_sequences: whole ones, or parts of as many.
      stride: `BalanceConfig.aux_stride`.
      within: adds the sums over the other parts of the same sequences.
      total: adds the sums over sequences of other devices. Where several hold parts of the same
        sequences, it counts all of them alike.
    """
    n_tokens, n_experts = token_weights.shape[0], balance_scores.shape[1]
    token_weights = token_weights.astype(balance_scores.dtype)
    sampled = token_weights[::stride]
    sequence = assignment.token // (n_tokens // n_sequences)
    counts = jnp.zeros((n_sequences, n_experts), token_weights.dtype)
    counts = counts.at[sequence, assignment.expert].add(
        token_weights[assignment.token], mode="drop"
    )
    probability = jax.nn.softmax(balance_scores) * sampled[:, None]
    counts, probability, n_tokens, n_sampled = within(
        (
            counts,
            probability.reshape(n_sequences, -1, n_experts).sum(axis=1),
            token_weights.reshape(n_sequences, -1).sum(axis=1),
            sampled.reshape(n_sequences, -1).sum(axis=1),
        )
    )
    load, mean_probability = (
        counts / _at_least_one(n_tokens),
        probability / _at_least_one(n_sampled),
    )
    loss, n_sequences = total(
        (balance_loss(load, mean_probability).sum(), (n_tokens > 0).astype(load.dtype).sum())
    )
    return loss / jnp.maximum(n_sequences, 1)


def _at_least_one(counts):
    return jnp.maximum(counts, 1)[:, None]


def updated_bias(bias, load, score_spread, rate):
    """Loss-free balancing (Wang et al. 2024, arXiv 2408.15664): `bias + rate * spread * sign(mean
    load - load)`.

    The published rate, 0.001, is for scores in (0, 1). Norms and logits have a scale of their own,
    which training changes, so the rate is relative to how far a token's scores lie apart.

    Args:
      bias: `[L, n]`. load: `[L, n]`. score_spread: `[L]`.
      rate: `BalanceConfig.bias_rate`.
    """
    return bias + rate * score_spread[:, None] * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def balance_loss(load, mean_probability):
    """`n sum_i f_i P_i` (Eq. 2 and 6 without alpha): `[..., n] -> [...]`; perfect balance gives the
    experts per token.
    """
    return load.shape[-1] * jnp.sum(load * mean_probability, axis=-1)


def load_entropy(load):
    """Ent_load (Eq. 7) of the shares of load, `[..., n] -> [...]` of NumPy; at most log n, reached
    in perfect balance.
    """
    share = np.asarray(load) / np.maximum(np.sum(load, axis=-1, keepdims=True), 1e-9)
    return entr(share).sum(axis=-1)


def load_spread(load, live=None):
    """Sum over layers of the largest minus the smallest load of live experts: `[L, n] -> []`, of
    NumPy.
    """
    least = load if live is None else np.where(live > 0, load, np.inf)
    return (np.max(load, axis=-1) - np.min(least, axis=-1)).sum()


def mean_load(load, live=None):
    """The mean load of live experts, `[..., n] -> [...]`."""
    return load.mean(axis=-1) if live is None else load.sum(axis=-1) / (live > 0).sum(axis=-1)


def dead_experts(load, live=None):
    """Which experts have no token, `[..., n]` bool; a place that no expert has is none."""
    return load == 0 if live is None else (load == 0) & (live > 0)
