"""The dispatch and combine stations: from tokens to rows by expert, and back. They know nothing of
methods.

T tokens, n experts, P slots, N places of rows, d model width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.experts.grouped_matmul import place_rows
from aoe_jax.experts.permute import NOWHERE, permute

MAX_GATHERS = 16  # that a sum over slots is spelled out with; top-p has as many slots as experts, and programs grow


class Plan(NamedTuple):
    """How slots are laid out as rows: in expert order, unused slots last, or wherever
    `grouped_matmul` wants them.

    In expert order N = P. Elsewhere there may be more places than rows, and no place for unused
    slots: what has no counterpart is `NOWHERE`, and reads as zeros.
    """

    order: jax.Array  # [N] int32, the slot of each row
    inverse: jax.Array  # [P] int32, the row of each slot
    token: jax.Array  # [N] int32, the token of each row
    groups: jax.Array | tuple  # of rows by expert, as `grouped_matmul` takes them


def sort_slots(expert, n_experts):
    """Slots in expert order: one stable sort, the order of slots within an expert is kept.

    Args:
      expert: `[P]` int32, the expert of each slot, n for an unused one.
      n_experts: n.

    Returns:
      `(order [P], inverse [P], group_sizes [n])`: the slot that comes first, second ..., where each
        slot comes, and the
      number of slots of each expert.
    """
    slots = jnp.arange(expert.shape[0], dtype=jnp.int32)
    _, order = jax.lax.sort((expert, slots), num_keys=1, is_stable=True)
    inverse = jnp.zeros_like(order).at[order].set(slots, unique_indices=True)
    return (
        order,
        inverse,
        jnp.sum(expert[:, None] == jnp.arange(n_experts), axis=0, dtype=jnp.int32),
    )


def plan_rows(assignment, n_experts):
    """Lays the slots of an `Assignment` out as rows."""
    order, inverse, group_sizes = sort_slots(assignment.expert, n_experts)
    places = place_rows(group_sizes, order.shape[0])
    if places is None:
        return Plan(order, inverse, assignment.token[order], group_sizes)
    order = _take(order, places.row, NOWHERE)
    return Plan(order, places.place[inverse], _take(assignment.token, order, NOWHERE), places)


def dispatch(x, assignment, plan):
    """The rows `[N, d]` of the tokens `x [T, d]`."""
    if assignment.slots_per_token is None:
        return _take(x, plan.token)
    return _gather_tokens(x, plan.token, plan.inverse, assignment.slots_per_token)


def take_activations(cache, assignment, plan):
    """The low-rank activations of each row's own expert: `cache [T, n, r]` -> `[N, r]`; zeros for
    unused rows.
    """
    expert = _take(assignment.expert, plan.order, cache.shape[1])
    return cache.at[plan.token, expert].get(mode="fill", fill_value=0)


def row_values(values, plan):
    """From slot order to row order: `[P]` -> `[N]`."""
    return permute(values, plan.order, plan.inverse)


def slot_values(values, plan):
    """From row order to slot order: `[N]` -> `[P]`."""
    return permute(values, plan.inverse, plan.order)


def combine(rows, assignment, plan, n_tokens):
    """The sum of each token's rows: `rows [N, d]` -> `[n_tokens, d]`, dtype of `rows`.

    The sum runs in float32 at least.
    """
    if assignment.slots_per_token is None:
        dtype = jnp.promote_types(rows.dtype, jnp.float32)
        return jax.ops.segment_sum(rows.astype(dtype), plan.token, n_tokens).astype(rows.dtype)
    return _sum_by_token(rows, plan.token, plan.inverse, assignment.slots_per_token)


def _take(values, index, fill=0):
    """`values[index]` along the first axis, `fill` where the index is out of range."""
    return values.at[index].get(mode="fill", fill_value=fill)


def _sum_slots(rows, inverse, slots_per_token):
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    by_token = inverse.reshape(-1, slots_per_token)
    if slots_per_token > MAX_GATHERS:
        return _take(rows, by_token).sum(axis=1, dtype=dtype).astype(rows.dtype)
    # Slot by slot: the gathers fuse with the sum, so the rows are never laid out by slot.
    return sum(_take(rows, by_token[:, k]).astype(dtype) for k in range(slots_per_token)).astype(
        rows.dtype
    )


# Dispatch and combine are each other's transpose.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather_tokens(x, token, inverse, slots_per_token):
    return _take(x, token)


_gather_tokens.defvjp(
    lambda x, token, inverse, slots_per_token: (_take(x, token), inverse),
    lambda slots_per_token, inverse, g: (_sum_slots(g, inverse, slots_per_token), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_by_token(rows, token, inverse, slots_per_token):
    return _sum_slots(rows, inverse, slots_per_token)


_sum_by_token.defvjp(
    lambda rows, token, inverse, slots_per_token: (
        _sum_slots(rows, inverse, slots_per_token),
        token,
    ),
    lambda slots_per_token, token, g: (_take(g, token), None, None),
)


# The same for a part of the slots, in any order: each other's transpose again, summed in float32 at
# least.
def take_rows(x, token):
    """The row of each token of `token [R]`, `x [T, d]` -> `[R, d]`; zeros where it is T."""
    return _take_rows(x, token, x.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(x, token, n_tokens):
    return _take(x, token)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_rows(rows, token, n_tokens):
    """The sum of the rows of each token: `rows [R, d]`, `token [R]` -> `[n_tokens, d]`; rows of
    token T count nowhere.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    zeros = jnp.zeros((n_tokens, rows.shape[1]), dtype)
    return zeros.at[token].add(rows.astype(dtype), mode="drop").astype(rows.dtype)


_take_rows.defvjp(
    lambda x, token, n_tokens: (_take_rows(x, token, n_tokens), token),
    lambda n_tokens, token, g: (add_rows(g, token, n_tokens), None),
)
add_rows.defvjp(
    lambda rows, token, n_tokens: (add_rows(rows, token, n_tokens), token),
    lambda n_tokens, token, g: (take_rows(g, token), None),
)
