"""Transports send tokens to their experts' devices, with the methods of `collectives.Devices`.

    Local      All experts are on the device (`dispatch.py`). Tokens are gathered over tensor, and
               outputs are summed and scattered back.
    Ring       Tokens are gathered over expert and tensor. Every device computes the rows of its own
               experts; outputs are summed and scattered back. Whichever experts are chosen, a
               device receives T d numbers from each of N - 1 other devices and sends as many back.
    AllToAll   Each row is sent to the device of its expert and back: about K T d numbers each way.
               Rows leave in expert order and arrive in expert order, so nothing is sorted twice.

No row is dropped, and memory is bounded: a device computes its rows in rounds of R rows, where R is
`ROW_BUFFER` times its number of rows under perfect balance. Autodiff applies to the first round. If
the load is uneven, further rounds follow. They keep nothing for the backward pass, which computes
them again. So memory for two rounds is enough, even if all tokens choose experts of one device.

`aoe_jax/moe/__init__.py` lists all letters in shapes.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.moe.collectives import Segments
from aoe_jax.moe.dispatch import Local, Rows, sort_slots
from aoe_jax.moe.grouped_matmul.groups import NOWHERE, PaddedGroups

ROW_BUFFER = 1.25


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(x, token, n_tokens):
    """`x [n_tokens, d]`, `token [R]` -> `[R, d]`; zeros where a token is `n_tokens`."""
    return x.at[token].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_rows(rows, token, n_tokens):
    """The sum of each token's rows: `[R, d]`, `[R]` -> `[n_tokens, d]`, in float32 at least."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    zeros = jnp.zeros((n_tokens, rows.shape[1]), dtype)
    return zeros.at[token].add(rows.astype(dtype), mode="drop").astype(rows.dtype)


_take_rows.defvjp(
    lambda x, token, n_tokens: (_take_rows(x, token, n_tokens), token),
    lambda n_tokens, token, g: (_add_rows(g, token, n_tokens), None),
)
_add_rows.defvjp(
    lambda rows, token, n_tokens: (_add_rows(rows, token, n_tokens), token),
    lambda n_tokens, token, g: (_take_rows(g, token, n_tokens), None),
)


class _Rounds(Local):
    """The base of transports with rounds. `share` is a device's row count in perfect balance."""

    def __init__(self, devices, n_experts, slots_per_token, share):
        super().__init__(devices, n_experts // devices.size("expert"), slots_per_token)
        self.size = max(8, math.ceil(ROW_BUFFER * share / 8) * 8)

    def further_rounds(self, first, function, schedule, args):
        """Adds `function(schedule, number, args)` of rounds 1 to `n_rounds - 1` to `first`.

        The number of rounds is known only at run time, so the rounds are a loop with a custom
        derivative: the backward pass recomputes each round and keeps nothing of it. `function` must
        not close over arrays. Only the arrays of `args` have a gradient.
        """
        return (first + _further_rounds(function, schedule, args)).astype(first.dtype)


class _RingSchedule(NamedTuple):
    slot: jax.Array  # [P + R] int32, slots in expert order, then R entries of value P
    end: jax.Array  # [n] int32, the end of the rows of each expert of the device
    n_rounds: jax.Array  # [] int32, of this device; other devices may need more or fewer


class Ring(_Rounds):
    """Gathers tokens over expert and tensor; every device computes the rows of its own experts."""

    def gather(self, x):
        return self.devices.gather(self.devices.gather(x, "expert"), "tensor")

    def scatter(self, y):
        return self.devices.sum_scatter(self.devices.sum_scatter(y, "tensor"), "expert")

    def gather_routing(self, routing):
        """Numbers this device's experts from 0; experts of other devices get `self.n_experts`."""
        gathered = super().gather_routing(routing)
        expert = gathered.expert - self.devices.rank("expert") * self.n_experts
        return gathered._replace(
            expert=jnp.where((expert >= 0) & (expert < self.n_experts), expert, self.n_experts)
        )

    def schedule(self, routing):
        """Sorts all slots by expert; slots for experts of other devices are last."""
        order, _, group_sizes = sort_slots(routing.expert, self.n_experts)
        order = jnp.pad(order, (0, self.size), constant_values=order.shape[0])
        end = jnp.cumsum(group_sizes)
        return _RingSchedule(order, end, -(-end[-1] // self.size))

    def round(self, schedule, number):
        """`(slot [R], group sizes [n])`; rows past the last group have slot P."""
        start = number * self.size
        within = jnp.clip(schedule.end - start, 0, self.size)
        used = jnp.arange(self.size) < within[-1]
        slot = jax.lax.dynamic_slice_in_dim(schedule.slot, start, self.size)
        return jnp.where(used, slot, schedule.slot[-1]), jnp.diff(within, prepend=0)

    def dispatch(self, x, round):
        slot, group_sizes = round
        return _take_rows(x, slot // self.slots_per_token, x.shape[0]), group_sizes

    def row_values(self, values, round):
        return values.at[round[0]].get(mode="fill", fill_value=0)

    def slot_values(self, values, round, n_slots):
        return jnp.zeros(n_slots, values.dtype).at[round[0]].set(values, mode="drop")

    def complete(self, values):
        """Sums over the expert axis: one device computed a slot's value, the others have 0."""
        return self.devices.total(values, ("expert",))

    def combine(self, rows, round, n_tokens):
        return _add_rows(rows, round[0] // self.slots_per_token, n_tokens)


class _AllToAllSchedule(NamedTuple):
    rows: Rows  # the device's own slots in expert order
    count: jax.Array  # [N, N, n] int32, rows by sender, receiver and expert of the receiver
    n_rounds: jax.Array  # [] int32, equal on all devices


class _AllToAllRound(NamedTuple):
    rows: Rows  # `row` of a slot without a row in this round is `NOWHERE`
    groups: PaddedGroups
    sent: Segments
    received: Segments


def _in_lanes(rows):
    """`[M, d]` -> `[M, d / 128, 128]` if 128 divides d: the layout in which TPUs send rows."""
    return rows if rows.shape[1] % 128 else rows.reshape(rows.shape[0], -1, 128)


class AllToAll(_Rounds):
    """Sends each row to its place in the expert order of its expert's device."""

    def schedule(self, routing):
        n_devices = self.devices.size("expert")
        slot, row, group_sizes = sort_slots(routing.expert, n_devices * self.n_experts)
        count = self.devices.gather(group_sizes, "expert").reshape(n_devices, n_devices, -1)
        n_rounds = self.devices.largest(-(-count.sum(axis=(0, 2)).max() // self.size))
        rows = Rows(slot, row, routing.token[slot], PaddedGroups(group_sizes))
        return _AllToAllSchedule(rows, count, n_rounds)

    def round(self, schedule, number):
        count, first, rank = schedule.count, number * self.size, self.devices.rank("expert")
        by_sender = count.reshape(count.shape[0], -1)
        source = (jnp.cumsum(by_sender, axis=1) - by_sender).reshape(count.shape)
        by_row = count.transpose(1, 2, 0)  # receivers have rows by expert, then by sender
        flat = by_row.reshape(count.shape[0], -1)
        end = jnp.cumsum(flat, axis=1).reshape(by_row.shape).transpose(2, 0, 1)
        landing = jnp.clip(end - count - first, 0, self.size)
        size = jnp.clip(end - first, 0, self.size) - landing
        source += jnp.clip(first - (end - count), 0, count)
        sent = Segments(source[rank], size[rank], landing[rank])
        received = Segments(landing[:, rank], size[:, rank], source[:, rank])
        rows = schedule.rows
        is_sent = sent.positions(rows.slot.shape[0]) >= 0
        rows = rows._replace(row=jnp.where(is_sent[rows.row], rows.row, NOWHERE))
        if self.slots_per_token is None:
            rows = rows._replace(token=jnp.where(is_sent, rows.token, NOWHERE))
        return _AllToAllRound(rows, PaddedGroups(received.size.sum(axis=0)), sent, received)

    def _send(self, rows, round):
        return self.devices.exchange_rows(rows, self.size, round.sent, round.received)

    def _return(self, rows, round):
        n_rows = round.rows.slot.shape[0]
        return self.devices.exchange_rows(rows, n_rows, round.received, round.sent)

    def dispatch(self, x, round):
        rows, _ = super().dispatch(_in_lanes(x), (None, round.rows))
        return self._send(rows, round).reshape(self.size, -1), round.groups

    def row_values(self, values, round):
        return self._send(super().row_values(values, (None, round.rows)), round)

    def slot_values(self, values, round, n_slots):
        return super().slot_values(self._return(values, round), (None, round.rows), n_slots)

    def combine(self, rows, round, n_tokens):
        rows = self._return(_in_lanes(rows), round)
        return super().combine(rows, (None, round.rows), n_tokens).reshape(n_tokens, -1)


TRANSPORTS = {"ring": Ring, "all_to_all": AllToAll}


def _loop(function, count, like):
    """The sum of `function(number)` for numbers from 1 to `count - 1`, in float32 at least."""
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), like
    )
    return jax.lax.fori_loop(
        1, count, lambda number, total: jax.tree.map(jnp.add, total, function(number)), zeros
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(function, schedule, args):
    with jax.named_scope("further_rounds"):
        shape = jax.eval_shape(lambda: function(schedule, 1, args))
        return _loop(lambda number: function(schedule, number, args), schedule.n_rounds, shape)


def _further_rounds_backward(function, residuals, g):
    schedule, args = residuals
    with jax.named_scope("further_rounds"):

        def gradient(number):
            result, pull_back = jax.vjp(partial(function, schedule, number), args)
            return pull_back(g.astype(result.dtype))[0]

        d_args = _loop(gradient, schedule.n_rounds, args)
    return None, jax.tree.map(lambda d, a: d.astype(a.dtype), d_args, args)


_further_rounds.defvjp(
    lambda function, *arrays: (_further_rounds(function, *arrays), arrays),
    _further_rounds_backward,
)
