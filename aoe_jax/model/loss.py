"""Cross-entropy over a large vocabulary, in chunks of tokens, without an array of all logits."""

from functools import partial

import jax
import jax.numpy as jnp

from aoe_jax.model.vocabulary import logits

CHUNK_TOKENS = 1024
SCORED_CHUNK_TOKENS = 256  # smaller, because scoring often needs few tokens of a sequence


def _chunks(*arrays, size=CHUNK_TOKENS):
    """Cuts `arrays [T, ...]` into chunks `[T / size, size, ...]`, with zeros after the end."""
    n_tokens = arrays[0].shape[0]
    size = min(n_tokens, size)

    def cut(a):
        padded = jnp.pad(a, ((0, -n_tokens % size), *((0, 0) for _ in a.shape[1:])))
        return padded.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(cut, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sums_over_chunks(of_chunk, n_sums, hidden, table, targets, weights):
    """Sums over tokens, `[n_sums]` float32; the first one is the loss, and only it has a gradient.

    The gradient is computed together with the loss, chunk by chunk, so that no logits are kept or
    computed twice. It is written by hand, because autodiff keeps more arrays and is slower. XLA
    removes the gradient from programs that use only the sums.

    `hidden` has one array `[T, d]` per pass, and `of_chunk` is
    `(logits of each pass, targets, weights) -> (sums, gradients of the loss by the logits)`.
    """
    return _forward(of_chunk, n_sums, hidden, table, targets, weights)[0]


def _forward(of_chunk, n_sums, hidden, table, targets, weights):
    cast = table.astype(hidden[0].dtype)

    def add(carry, chunk):
        (sums, d_table), (*h, t, w) = carry, chunk
        of_this, d_logits = of_chunk([logits(a, cast) for a in h], t, w)
        d_logits = [d.astype(cast.dtype) for d in d_logits]
        for d, a in zip(d_logits, h, strict=True):
            d_table = d_table + jnp.einsum("nv,nd->vd", d, a, preferred_element_type=d_table.dtype)
        return (sums + jnp.stack(of_this), d_table), tuple(d @ cast for d in d_logits)

    start = jnp.zeros(n_sums, jnp.float32), jnp.zeros_like(table)
    (sums, d_table), d_hidden = jax.lax.scan(add, start, _chunks(*hidden, targets, weights))
    n_tokens, width = hidden[0].shape
    return sums, (tuple(d.reshape(-1, width)[:n_tokens] for d in d_hidden), d_table)


def _backward(of_chunk, n_sums, residuals, g):
    d_hidden, d_table = residuals
    return tuple((g[0] * d).astype(d.dtype) for d in d_hidden), g[0] * d_table, None, None


sums_over_chunks.defvjp(_forward, _backward)


def cross_entropy(hidden, table, targets, weights):
    """Sum over tokens of `weight * -log softmax(hidden table^T)[target]`, `[]` float32, in nats.

    `hidden [T, d]`; `table [V, d]` float32, cast to the dtype of `hidden` for the product;
    `targets [T]` int32; `weights [T]` float32, without a gradient.
    """
    return sums_over_chunks(_of_one_pass, 1, (hidden,), table, targets, weights)[0]


def _of_one_pass(logits, targets, weights):
    (logits,) = logits
    log_normaliser = jax.nn.logsumexp(logits, axis=1)
    nll = log_normaliser - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    one_hot = targets[:, None] == jnp.arange(logits.shape[1])
    by_logits = (jnp.exp(logits - log_normaliser[:, None]) - one_hot) * weights[:, None]
    return [jnp.sum(weights * nll)], [by_logits]


def target_log_probs(hidden, table, targets, wanted):
    """The log-probability of each wanted target, and whether the target is the likeliest token.

    Only chunks with tokens that are `wanted [T]` compute logits. The other arguments are those
    of `cross_entropy`.

    Returns:
      `(log_prob, is_best)`: `[T]` float32, 0 where not wanted; and `[T]` bool, true where not
      wanted. If tokens are equally likely, the first counts as the likeliest.
    """
    cast = table.astype(hidden.dtype)
    order = jnp.argsort(~wanted)  # wanted tokens first

    def score(token, target):
        values = logits(hidden[token], cast)
        of_target = jnp.take_along_axis(values, target[:, None], axis=1)[:, 0]
        log_prob = of_target - jax.nn.logsumexp(values, axis=1)
        return log_prob.astype(jnp.float32), values.argmax(axis=1) == target

    def skip(token, target):
        return jnp.zeros(token.shape, jnp.float32), jnp.ones(token.shape, bool)

    def chunk_scores(chunk):
        token, target, is_wanted = chunk
        return jax.lax.cond(is_wanted.any(), score, skip, token, target)

    chunks = _chunks(order, targets[order], wanted[order], size=SCORED_CHUNK_TOKENS)
    scores = [a.reshape(-1)[: wanted.shape[0]] for a in jax.lax.map(chunk_scores, chunks)]
    log_prob, is_best = (jnp.zeros_like(a).at[order].set(a, unique_indices=True) for a in scores)
    return jnp.where(wanted, log_prob, 0), is_best | ~wanted
