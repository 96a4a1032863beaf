"""`jax.lax.ragged_dot`, the baseline of benchmarks and the reference of tests. It is dense (E times
the useful FLOPs) on CPU and on most accelerators.
"""

import jax
import jax.numpy as jnp

from aoe_jax.moe.grouped_matmul.groups import group_sizes_of, zero_past_groups


def ragged_matmul(rows, weights, groups):
    """The backend "ragged" of `grouped_matmul`, with its arguments."""
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    # The results of ragged_dot past the last group are undefined, so they are set to zero.
    rows, sizes = zero_past_groups(rows, groups), group_sizes_of(groups)
    out = jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=accumulator)
    return zero_past_groups(out, groups).astype(rows.dtype)
