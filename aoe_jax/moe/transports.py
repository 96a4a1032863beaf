"""Transports send tokens to their experts' devices, with the methods of `collectives.Devices`.

    Local      All experts are on the device (`dispatch.py`). Tokens are gathered over tensor, and
               outputs are summed and scattered back.
    Ring       Tokens are gathered over expert and tensor. Every device computes the rows of its own
               experts; outputs are summed and scattered back. Whichever experts are chosen, a
               device receives T d numbers from each of N - 1 other devices and sends as many back.
    AllToAll   Each row is sent to the device of its expert and back: about K T d numbers each way.

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

from aoe_jax.moe.collectives import Segments, before, moved
from aoe_jax.moe.dispatch import Local, Rows, sort_slots
from aoe_jax.moe.grouped_matmul.groups import PaddedGroups, take

ROW_BUFFER = 1.25
LANES = 128


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(x, token, n_tokens):
    """`x [n_tokens, d]`, `token [R]` -> `[R, d]`; zeros where a token is `n_tokens`."""
    return take(x, token)


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
        """`(slot [R], groups)`; rows past the last group have slot P, which drops their results."""
        start = number * self.size
        within = jnp.clip(schedule.end - start, 0, self.size)
        used = jnp.arange(self.size) < within[-1]
        slot = jax.lax.dynamic_slice_in_dim(schedule.slot, start, self.size)
        groups = PaddedGroups(jnp.diff(within, prepend=0))
        return jnp.where(used, slot, schedule.slot[-1]), groups

    def dispatch(self, x, round):
        slot, groups = round
        return _take_rows(x, slot // self.slots_per_token, x.shape[0]), groups

    def row_values(self, values, round):
        return take(values, round[0])

    def slot_values(self, values, round, n_slots):
        return jnp.zeros(n_slots, values.dtype).at[round[0]].set(values, mode="drop")

    def complete(self, values):
        """Sums over the expert axis: one device computed a slot's value, the others have 0."""
        return self.devices.total(values, ("expert",))

    def combine(self, rows, round, n_tokens):
        return _add_rows(rows, round[0] // self.slots_per_token, n_tokens)


def _in_lanes(rows):
    """`[M, d]` -> `[M, d / 128, 128]` if 128 divides d: the layout in which TPUs send rows."""
    return rows if rows.shape[1] % LANES else rows.reshape(rows.shape[0], -1, LANES)


class _AllToAllSchedule(NamedTuple):
    rows: Rows  # the device's own slots in expert order
    count: jax.Array  # [N, N, n] int32, rows by sender, receiver and expert of the receiver
    n_rounds: jax.Array  # [] int32, the maximum over pairs of devices; equal on all devices


class _AllToAllRound(NamedTuple):
    rows: Rows  # rows to send; a slot without one has the row `NOWHERE`
    groups: PaddedGroups
    sent: Segments
    received: Segments


class AllToAll(_Rounds):
    """Sends each row to its place in the expert order of its expert's device.

    In a round, a device sends at most `R / N` rows to each device, one run for each expert.
    """

    def __init__(self, devices, n_experts, slots_per_token, share):
        n_devices = devices.size("expert")
        super().__init__(devices, n_experts, slots_per_token, share / n_devices)
        self.pair_size, self.size = self.size, n_devices * self.size

    def schedule(self, routing):
        n_devices = self.devices.size("expert")
        slot, row, group_sizes = sort_slots(routing.expert, n_devices * self.n_experts)
        count = self.devices.gather(group_sizes, "expert").reshape(n_devices, n_devices, -1)
        n_rounds = self.devices.largest(-(-count.sum(axis=2).max() // self.pair_size))
        return _AllToAllSchedule(Rows(slot, row, routing.token[slot], ()), count, n_rounds)

    def round(self, schedule, number):
        count, rank = schedule.count, self.devices.rank("expert")
        first = number * self.pair_size
        start = before(count)  # of a run, among the rows of its pair of devices
        begin, end = (jnp.clip(a - first, 0, self.pair_size) for a in (start, start + count))
        size = end - begin
        source = before(size.reshape(size.shape[0], -1)).reshape(size.shape)
        by_expert = size.transpose(1, 2, 0)  # receivers have rows by expert, then by sender
        landing = before(by_expert.reshape(size.shape[0], -1)).reshape(by_expert.shape)
        landing = landing.transpose(2, 0, 1)
        sent = Segments(source[rank], size[rank], landing[rank])
        received = Segments(landing[:, rank], size[:, rank], source[:, rank])
        groups = PaddedGroups(received.size.sum(axis=0))
        slot, row, token, _ = schedule.rows
        in_order = before(count[rank].reshape(-1)).reshape(sent.size.shape)
        in_order += jnp.clip(first - start[rank], 0, count[rank])
        # Any token serves for rows that are not sent.
        taken = jnp.minimum(moved(self.size, in_order, sent.size, sent.start), slot.shape[0] - 1)
        row = moved(slot.shape[0], sent.start, sent.size, in_order)[row]
        rows = Rows(slot[taken], row, token[taken], ())
        return _AllToAllRound(rows, groups, sent, received)

    def _send(self, rows, round):
        return self.devices.exchange_rows(rows, round.sent, round.received)

    def _return(self, rows, round):
        return self.devices.exchange_rows(rows, round.received, round.sent)

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
