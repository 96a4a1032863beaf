"""Plain JAX for fewer rows than experts, for example in decoding: a loop over rows loads only the
weights of experts that have a row.
"""

import jax
import jax.numpy as jnp

from aoe_jax.moe.grouped_matmul.groups import dot, find, group_sizes_of


def rowwise_matmul(rows, weights, groups):
    """The backend "rowwise" of `grouped_matmul`, with its arguments; rows are in expert order."""
    return _rowwise(rows, weights, group_sizes_of(groups))


@jax.custom_vjp
def _rowwise(rows, weights, group_sizes):
    return _product(rows, weights, group_sizes, 0)


def _product(rows, weights, group_sizes, contracted):
    expert = find(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]))

    def add(i, out):
        w = jax.lax.dynamic_index_in_dim(weights, expert[i], keepdims=False)
        return out.at[i].set(dot(rows[i], w, (0, contracted)).astype(out.dtype))

    zeros = jnp.zeros((rows.shape[0], weights.shape[2 - contracted]), rows.dtype)
    return jax.lax.fori_loop(0, group_sizes.sum(), add, zeros)


def _backward(residuals, g):
    rows, weights, group_sizes = residuals
    expert = find(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]))
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)

    def add(i, d_weights):
        return d_weights.at[expert[i]].add(
            rows[i, :, None].astype(accumulator) * g[i].astype(accumulator)
        )

    d_weights = jax.lax.fori_loop(0, group_sizes.sum(), add, jnp.zeros(weights.shape, accumulator))
    return _product(g, weights, group_sizes, 1), d_weights.astype(weights.dtype), None


_rowwise.defvjp(lambda *args: (_rowwise(*args), args), _backward)
