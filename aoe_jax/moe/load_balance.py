"""Load balance: auxiliary losses, loss-free balancing, and the statistics of a layer's load.

All values are float32 or wider.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr


class LayerStats(NamedTuple):
    """Statistics of a layer over a batch. Only fields that losses use have gradients."""

    load: jax.Array  # [n], f of Eq. 2: fraction of tokens routed to each expert; the sum is K
    mean_probability: jax.Array  # [n], P of Eq. 2: mean over tokens of the softmax over all scores
    confidence_entropy: jax.Array  # [], mean over tokens of Ent_conf (Eq. 8)
    mean_score: jax.Array  # [n], mean norm or logit of each expert (Fig. 4)
    score_spread: jax.Array  # [], mean over tokens of the standard deviation of the n scores
    z_loss: jax.Array | None = None  # [], None if `balance.z_weight` is 0
    sequence_loss: jax.Array | None = None  # [], in training with `aux_batch="sequence"`, else None
    dropped_share: jax.Array | None = None  # [], fraction of token-expert pairs that are dropped
    # The next four fields are copied from `routing.Routing`.
    records: dict[str, jax.Array] | None = None
    shares: dict[str, jax.Array] | None = None
    per_token: dict[str, jax.Array] | None = None
    live: jax.Array | None = None


def statistics(scores, routing, balance, ctx):
    """Computes the `LayerStats` of a `Routing` as means over the real tokens of all devices."""
    values, for_balance = jax.lax.stop_gradient(scores.values), scores.for_balance
    weights, n_experts = ctx.token_weights.astype(values.dtype), values.shape[1]
    chosen = routing.expert[:, None] == jnp.arange(n_experts)
    load = jnp.sum(jnp.where(chosen, weights[routing.token][:, None], 0), axis=0)
    log_probability = jax.nn.log_softmax(for_balance)
    probability = jnp.exp(log_probability)
    entropy = -jnp.sum(probability * log_probability, axis=1)

    sampled = weights[:: balance.aux_stride]
    counts, of_sampled, of_all = ctx.devices.total(
        (
            (weights.sum(), sampled.sum()),
            (_token_sum(probability, sampled), _token_sum(entropy, sampled)),
            (load, _token_sum(values, weights), _token_sum(jnp.std(values, axis=1), weights)),
        )
    )
    n_tokens, n_sampled = (jnp.maximum(count, 1) for count in counts)
    mean_probability, confidence_entropy = (total / n_sampled for total in of_sampled)
    load, mean_score, score_spread = (total / n_tokens for total in of_all)
    stats = LayerStats(load, mean_probability, confidence_entropy, mean_score, score_spread)
    if balance.z_weight:
        stats = stats._replace(z_loss=z_loss(for_balance, sampled, ctx.devices.total))
    if ctx.training and balance.aux_batch == "sequence":
        loss = sequence_balance_loss(scores, routing, ctx, balance.aux_stride)
        stats = stats._replace(sequence_loss=loss)
    extras = {name: getattr(routing, name) for name in ("records", "shares", "per_token", "live")}
    return stats._replace(**extras)


def _token_sum(values, weights):
    return jnp.einsum("t,t...->...", weights, values, precision=jax.lax.Precision.HIGHEST)


def balance_loss(load, mean_probability):
    """`n sum_i f_i P_i` (Eq. 2 and 6 without alpha): `[..., n] -> [...]`; K in perfect balance."""
    return load.shape[-1] * jnp.sum(load * mean_probability, axis=-1)


def z_loss(scores, token_weights, total):
    """The mean over tokens of `(log sum_i exp(score_i))^2` (ST-MoE, Zoph et al. 2022, arXiv
    2202.08906), which keeps router logits small. With AoE it shrinks all norms.
    `scores [T, n]`, `token_weights [T]` -> `[]`; `total` sums over all devices.
    """
    square = jnp.square(jax.nn.logsumexp(scores, axis=1))
    loss, n_tokens = total((jnp.sum(square * token_weights), token_weights.sum()))
    return loss / jnp.maximum(n_tokens, 1)


def sequence_balance_loss(scores, routing, ctx, stride):
    """The mean over sequences of the `balance_loss` of each sequence, `[]`.

    It is the micro-batch balance of Qiu et al. 2025 (arXiv 2501.11873) with one sequence per
    micro-batch, so it is the same on every mesh. `stride` (`BalanceConfig.aux_stride`) divides the
    sequence length. Raises ValueError for tokens `[T, d]` on a mesh: their sequences are unknown.
    """
    devices = ctx.devices
    devices.check_sequences()
    n_sequences = math.prod(devices.shape[:-1])
    n_experts = scores.for_balance.shape[1]
    weights = ctx.token_weights.astype(scores.for_balance.dtype)
    sampled = weights[::stride]
    sequence = routing.token // (weights.shape[0] // n_sequences)
    counts = jnp.zeros((n_sequences, n_experts), weights.dtype)
    counts = counts.at[sequence, routing.expert].add(weights[routing.token], mode="drop")
    probability = jax.nn.softmax(scores.for_balance) * sampled[:, None]
    counts, probability, n_tokens, n_sampled = devices.total(
        (
            counts,
            probability.reshape(n_sequences, -1, n_experts).sum(axis=1),
            weights.reshape(n_sequences, -1).sum(axis=1),
            sampled.reshape(n_sequences, -1).sum(axis=1),
        ),
        ("tensor",),
    )
    load = counts / jnp.maximum(n_tokens, 1)[:, None]
    mean_probability = probability / jnp.maximum(n_sampled, 1)[:, None]
    losses, is_real = balance_loss(load, mean_probability), (n_tokens > 0).astype(load.dtype)
    # Both sums count a sequence once per device along tensor; this factor cancels in the quotient.
    loss, n_sequences = devices.total((losses.sum(), is_real.sum()))
    return loss / jnp.maximum(n_sequences, 1)


def updated_bias(bias, load, score_spread, rate):
    """Loss-free balancing (Wang et al. 2024, arXiv 2408.15664):
    `bias + rate * score_spread * sign(mean load - load)`.

    The published rate, 0.001, is meant for scores in (0, 1). Training changes the scale of norms
    and logits, so `score_spread [L]` is a factor. `bias [L, n]`, `load [L, n]` -> `[L, n]`.
    """
    direction = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    return bias + rate * score_spread[:, None] * direction


def load_entropy(load):
    """Ent_load (Eq. 7), the entropy of the normalised load: `[..., n] -> [...]`, at most log n."""
    share = np.asarray(load) / np.maximum(np.sum(load, axis=-1, keepdims=True), 1e-9)
    return entr(share).sum(axis=-1)


def load_spread(load, live=None):
    """`[L, n] -> []`: the largest minus the smallest load of live experts, summed over layers."""
    least = load if live is None else np.where(live > 0, load, np.inf)
    return (np.max(load, axis=-1) - np.min(least, axis=-1)).sum()


def layer_statistics(load, live=None):
    """Returns `{name: statistic [L]}`, from loads `[L, n]`.

    `load_entropy` is in nats. `load_max_over_mean` is the largest divided by the mean load: 1 in
    perfect balance, and 0 if no token is routed to any expert. `dead_experts` is the number of
    experts without tokens. `live [L, n]`, of methods that add and remove experts, is 0 for experts
    that do not exist at this step: no statistic counts them, and `live_experts` counts the rest.
    """
    n_live = load.shape[-1] if live is None else (live > 0).sum(axis=-1)
    is_dead = load == 0 if live is None else (load == 0) & (live > 0)
    found = {
        "load_entropy": load_entropy(load),
        "load_max_over_mean": load.max(axis=-1) * n_live / np.maximum(load.sum(axis=-1), 1e-9),
        "dead_experts": is_dead.sum(axis=-1),
    }
    return found if live is None else found | {"live_experts": n_live}
