"""Dispatch gathers tokens into rows in expert order; combine sums the rows of each token.

A transport computes both. `Local` is the transport of a device that stores all experts. The other
transports, which are for meshes, have the same methods and are in `transports.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.moe.grouped_matmul import RowLayout, row_layout
from aoe_jax.moe.grouped_matmul.groups import NOWHERE, WholeGroups, permute, take
from aoe_jax.moe.routing import Routing

# With more slots per token, one gather loads all rows, because many gathers make a big program.
MAX_GATHERS = 16


class Rows(NamedTuple):
    """Maps slots to rows and rows to slots. Rows are in expert order or in a `RowLayout`.

    `row` of a slot without a row may be `NOWHERE`. With a `RowLayout`, R is its number of
    positions; `slot` and `token` of a position without a row are `NOWHERE`, and arrays of rows
    contain zeros there.
    """

    slot: jax.Array  # [R] int32, the slot of each row
    row: jax.Array  # [P] int32, the row of each slot
    token: jax.Array  # [R] int32, the token of each row
    groups: jax.Array | tuple  # the argument `groups` of `grouped_matmul`


def sort_slots(expert, n_experts):
    """Sorts slots by expert, stably. `expert [P]` int32 is n for an unused slot.

    Returns the slot of each row `[P]`, the row of each slot `[P]` and the size of each group `[n]`.
    """
    slots = jnp.arange(expert.shape[0], dtype=jnp.int32)
    _, slot = jax.lax.sort((expert, slots), num_keys=1, is_stable=True)
    row = jnp.zeros_like(slot).at[slot].set(slots, unique_indices=True)
    return slot, row, jnp.sum(expert[:, None] == jnp.arange(n_experts), axis=0, dtype=jnp.int32)


def lay_out(routing, n_experts, all_used=False, backend="auto", dtype="float32"):
    """Computes the `Rows` of a `Routing` for a backend and the dtype of the rows; `all_used`: every
    slot has an expert, because each token has K.
    """
    slot, row, group_sizes = sort_slots(routing.expert, n_experts)
    layout = row_layout(group_sizes, slot.shape[0], backend, dtype)
    if layout is None:
        groups = WholeGroups(group_sizes) if all_used else group_sizes
        return Rows(slot, row, routing.token[slot], groups)
    slot = take(slot, layout.row, NOWHERE)
    return Rows(slot, layout.position[row], take(routing.token, slot, NOWHERE), layout)


class Local:
    """The transport of a device that stores all experts: it computes the rows of all its slots.

    Other transports split the rows into rounds of limited size; `Local` has one round. A transport
    has these methods, in the order of their use:
        gather, gather_routing   gather tokens and routing over the mesh axes that split the experts
        schedule, round          compute the slots and rows of each round, without a gradient
        dispatch                 tokens `[T, d]` -> rows `[R, d]`, and `groups` for `grouped_matmul`
        row_values               moves values from slots to rows, `[P]` -> `[R]`
        slot_values              moves values to slots, `[R]` -> `[P]`; a slot without a row gets 0
        complete                 adds the values that other devices computed for slots `[P]`
        combine                  sums each token's rows in float32 at least: `[R, d]` -> `[T, d]`
        further_rounds           adds `function(schedule, number, args)` of later rounds to `first`
        scatter                  transpose of `gather`: sends summed outputs to the tokens' devices
    """

    def __init__(self, devices, n_experts, slots_per_token, **layout):
        """`slots_per_token` is that of each `Routing`; `layout` has arguments of `lay_out`."""
        self.devices, self.n_experts = devices, n_experts
        self.slots_per_token = slots_per_token
        self.lay_out = partial(lay_out, n_experts=n_experts, **layout)

    def gather(self, x):
        return self.devices.gather(x, "tensor")

    def scatter(self, y):
        return self.devices.sum_scatter(y, "tensor")

    def gather_routing(self, routing):
        k = self.slots_per_token
        if k is None:
            return routing
        expert = self.gather(routing.expert.reshape(-1, k)).reshape(-1)
        weight = self.gather(routing.weight.reshape(-1, k)).reshape(-1)
        token = jnp.arange(expert.shape[0], dtype=jnp.int32) // k
        return Routing(token, expert, weight, k)

    def schedule(self, routing):
        return routing, self.lay_out(routing)

    def round(self, schedule, number):
        return schedule

    def dispatch(self, x, round):
        rows = round[1]
        if self.slots_per_token is None:
            return take(x, rows.token), rows.groups
        return _gather_tokens(x, rows, self.slots_per_token), rows.groups

    def row_values(self, values, round):
        return permute(values, round[1].slot, round[1].row)

    def slot_values(self, values, round, n_slots):
        return permute(values, round[1].row, round[1].slot)

    def complete(self, values):
        return values

    def combine(self, y, round, n_tokens):
        rows = round[1]
        if self.slots_per_token is None:
            dtype = jnp.promote_types(y.dtype, jnp.float32)
            return jax.ops.segment_sum(y.astype(dtype), rows.token, n_tokens).astype(y.dtype)
        return _sum_by_token(y, rows, self.slots_per_token)

    def further_rounds(self, first, function, schedule, args):
        return first


def take_code(code, round):
    """Selects each row's low-rank activation by token and expert: `code [T, n, r]` -> `[R, r]`."""
    routing, rows = round
    expert = take(routing.expert, rows.slot, code.shape[1])
    return code.at[rows.token, expert].get(mode="fill", fill_value=0)


def _take_by(values, index, rows):
    """`values[index]` for an index array of `Rows`; zeros where the index is `NOWHERE`."""
    if isinstance(rows.groups, WholeGroups):  # no index is `NOWHERE`
        return values.at[index].get(mode="promise_in_bounds")
    return take(values, index)


def _take_tokens(x, rows):
    """The token of each row, `[T, ...] -> [R, ...]`; zeros for positions without a row."""
    if isinstance(rows.groups, RowLayout):
        return take(x, rows.token)
    return x.at[rows.token].get(mode="promise_in_bounds")


def _sum_slots(values, rows, slots_per_token):
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    by_token = rows.row.reshape(-1, slots_per_token)
    if slots_per_token > MAX_GATHERS:
        return _take_by(values, by_token, rows).sum(axis=1, dtype=dtype).astype(values.dtype)
    # One gather per slot fuses with the sum, so no array `[T, K, d]` is made.
    slots = (_take_by(values, by_token[:, k], rows) for k in range(slots_per_token))
    return sum(a.astype(dtype) for a in slots).astype(values.dtype)


# Dispatch and combine are each other's transpose, so each computes the gradient of the other.
# Autodiff would turn the gathers into scatter-adds, which are slow on all platforms.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather_tokens(x, rows, slots_per_token):
    return _take_tokens(x, rows)


_gather_tokens.defvjp(
    lambda x, rows, slots_per_token: (_gather_tokens(x, rows, slots_per_token), rows),
    lambda slots_per_token, rows, g: (_sum_slots(g, rows, slots_per_token), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_by_token(y, rows, slots_per_token):
    return _sum_slots(y, rows, slots_per_token)


_sum_by_token.defvjp(
    lambda y, rows, slots_per_token: (_sum_slots(y, rows, slots_per_token), rows),
    lambda slots_per_token, rows, g: (_take_tokens(g, rows), None),
)
