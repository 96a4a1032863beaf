"""Cross-entropy over a large vocabulary, and what two passes differ in, without ever holding all logits.

N tokens, V vocabulary, d model width.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024
SCORED_CHUNK_TOKENS = 256  # of a sequence that is scored often only a few tokens are wanted


def _chunks(*arrays, size=CHUNK_TOKENS):
    """Cuts the token axis of `arrays [N, ...]` into chunks of `size`, the last one filled up with zeros, so weight 0."""
    n_tokens = arrays[0].shape[0]
    size = min(n_tokens, size)

    def cut(a):
        padded = jnp.pad(a, ((0, -n_tokens % size), *((0, 0) for _ in a.shape[1:])))
        return padded.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(cut, arrays)


def _logits(hidden, table):
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=accumulator)


@jax.custom_vjp
def cross_entropy(hidden, table, targets, weights):
    """Sum over tokens of `weight * -log softmax(hidden table^T)[target]`, float32, in nats.

    The gradient is computed beside the loss, chunk by chunk, so that no logits are kept or computed twice.

    Args:
      hidden: `[N, d]`.
      table: `[V, d]`, float32 parameters; cast to the dtype of `hidden` for the product.
      targets: `[N]` int32.
      weights: `[N]` float32; no gradient.

    Returns:
      A scalar.
    """
    cast = table.astype(hidden.dtype)

    def chunk_loss(total, chunk):
        h, t, w = chunk
        logits = _logits(h, cast)
        nll = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0]
        return total + jnp.sum(w * nll), None

    return jax.lax.scan(chunk_loss, jnp.zeros((), jnp.float32), _chunks(hidden, targets, weights))[0]


def _forward(hidden, table, targets, weights):
    cast = table.astype(hidden.dtype)

    def chunk_gradient(carry, chunk):
        total, d_table = carry
        h, t, w = chunk
        logits = _logits(h, cast)
        log_normaliser = jax.nn.logsumexp(logits, axis=1)
        nll = log_normaliser - jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0]
        one_hot = t[:, None] == jnp.arange(table.shape[0])
        d_logits = ((jnp.exp(logits - log_normaliser[:, None]) - one_hot) * w[:, None]).astype(h.dtype)
        d_hidden = d_logits @ cast
        d_table = d_table + jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=d_table.dtype)
        return (total + jnp.sum(w * nll), d_table), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(table))
    (total, d_table), d_hidden = jax.lax.scan(chunk_gradient, start, _chunks(hidden, targets, weights))
    return total, (d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], d_table)


def _backward(residuals, g):
    d_hidden, d_table = residuals
    return (g * d_hidden).astype(d_hidden.dtype), g * d_table, None, None


cross_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def consistent_cross_entropy(consistency, hidden, table, targets, weights):
    """The cross-entropy of two passes, and the divergence of what they say of each token.

    As with `cross_entropy`, no logits are kept or computed twice.

    Args:
      consistency: weight of the divergence in the loss, a number.
      hidden: `[N, d]` of the first pass, and of the second.
      table, targets, weights: as in `cross_entropy`.

    Returns:
      `(loss, nll, divergence)`, sums over tokens, each by its weight: nll of both passes together, the symmetric divergence
      `(KL(p || q) + KL(q || p)) / 2` of their distributions, and `nll + consistency * divergence`. Only the loss has a
      gradient.
    """
    cast = table.astype(hidden[0].dtype)

    def chunk_loss(sums, chunk):
        *h, t, w = chunk
        return sums + _of_passes([_logits(a, cast) for a in h], t, w, consistency)[0], None

    sums = jax.lax.scan(chunk_loss, jnp.zeros(2, jnp.float32), _chunks(*hidden, targets, weights))[0]
    return _with_loss(sums, consistency)


def _with_loss(sums, consistency):
    nll, divergence = sums
    return nll + consistency * divergence, nll, divergence


def _of_passes(logits, targets, weights, consistency):
    """Of a chunk the sums `[nll, divergence]`, and the gradients of the loss by both logits."""
    one_hot = targets[:, None] == jnp.arange(logits[0].shape[1])
    log_p, log_q = (jax.nn.log_softmax(a) for a in logits)
    p, q, difference = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    kl_pq, kl_qp = (p * difference).sum(axis=1), -(q * difference).sum(axis=1)
    nll = -jnp.where(one_hot, log_p + log_q, 0).sum(axis=1)
    sums = jnp.stack([jnp.sum(weights * nll), jnp.sum(weights * (kl_pq + kl_qp) / 2)])
    half, weights = consistency / 2, weights[:, None]
    by_p = weights * (p - one_hot + half * (p * (difference - kl_pq[:, None]) + p - q))
    by_q = weights * (q - one_hot + half * (q * (-difference - kl_qp[:, None]) + q - p))
    return sums, (by_p, by_q)


def _passes_forward(consistency, hidden, table, targets, weights):
    cast = table.astype(hidden[0].dtype)

    def chunk_gradient(carry, chunk):
        sums, d_table = carry
        *h, t, w = chunk
        of_chunk, d_logits = _of_passes([_logits(a, cast) for a in h], t, w, consistency)
        d_logits = [d.astype(cast.dtype) for d in d_logits]
        for d, a in zip(d_logits, h, strict=True):
            d_table = d_table + jnp.einsum("nv,nd->vd", d, a, preferred_element_type=d_table.dtype)
        return (sums + of_chunk, d_table), tuple(d @ cast for d in d_logits)

    start, chunks = (jnp.zeros(2, jnp.float32), jnp.zeros_like(table)), _chunks(*hidden, targets, weights)
    (sums, d_table), d_hidden = jax.lax.scan(chunk_gradient, start, chunks)
    n_tokens, width = hidden[0].shape
    d_hidden = tuple(d.reshape(-1, width)[:n_tokens] for d in d_hidden)
    return _with_loss(sums, consistency), (d_hidden, d_table)


def _passes_backward(consistency, residuals, g):
    d_hidden, d_table = residuals
    return tuple((g[0] * d).astype(d.dtype) for d in d_hidden), g[0] * d_table, None, None


consistent_cross_entropy.defvjp(_passes_forward, _passes_backward)


def target_log_probs(hidden, table, targets, wanted):
    """The log-probability of each wanted target, and whether none is more probable; logits of wanted tokens alone.

    Args:
      hidden: `[N, d]`.
      table: `[V, d]`; cast to the dtype of `hidden` for the product.
      targets: `[N]` int32.
      wanted: `[N]` bool.

    Returns:
      `(log_prob, is_best)`: `[N]` float32, and bool, true for the first of several that are equally probable; 0 and true
      where it isn't wanted.
    """
    cast = table.astype(hidden.dtype)
    order = jnp.argsort(~wanted)  # those that are wanted first, so that there are chunks without any

    def score(token, target):
        logits = _logits(hidden[token], cast)
        log_prob = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        return log_prob.astype(jnp.float32), logits.argmax(axis=1) == target

    def skip(token, target):
        return jnp.zeros(token.shape, jnp.float32), jnp.ones(token.shape, bool)

    def chunk_scores(_, chunk):
        token, target, is_wanted = chunk
        return None, jax.lax.cond(is_wanted.any(), score, skip, token, target)

    chunks = _chunks(order, targets[order], wanted[order], size=SCORED_CHUNK_TOKENS)
    scores = [a.reshape(-1)[: wanted.shape[0]] for a in jax.lax.scan(chunk_scores, None, chunks)[1]]
    log_prob, is_best = (jnp.zeros_like(a).at[order].set(a, unique_indices=True) for a in scores)
    return jnp.where(wanted, log_prob, 0), is_best | ~wanted
