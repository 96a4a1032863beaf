"""Transports: how rows reach their experts over a mesh, with one set of methods. Collectives are in
`parallel.py`.

    Local      all experts are here. Tokens are gathered over tensor, and outputs summed and scattered back.
    Ring       tokens are gathered over expert and tensor; every device computes the rows of its own experts; outputs are
               summed and scattered home. It moves t d (E - 1) numbers to a device and as many back, whatever is chosen.
    AllToAll   each row goes to the device of its expert and back. It moves about K t d numbers to a device and as many back.

Nothing is dropped, and memory is bounded: a device takes its rows in rounds of R rows, `ROW_BUFFER`
times its share under perfect balance. The first round is computed like any layer. Where the load is
so uneven that rows are left, further rounds follow, as many as the fullest device needs; they keep
nothing for the backward pass and are computed again there. So the memory for rows stays at about
two rounds even where all tokens choose the experts of one device.

T tokens of a device once gathered, t tokens it owns, d model width, n experts, m experts of a
device, K slots of a token, P slots, R rows of a round, E devices along expert.
"""

import contextlib
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.experts import dispatch
from aoe_jax.experts.permute import permute
from aoe_jax.experts.selection.assignment import Assignment

ROW_BUFFER = 1.25


def is_local(devices, all_slots_used):
    """Whether all rows of a device's tokens are its own, and as many as its slots."""
    return devices.total_size == 1 or (devices.size("expert") == 1 and all_slots_used)


def make_transport(devices, n_experts, rows_per_token, n_tokens, slots_per_token):
    """The transport of a layer.

    Args:
      devices: `Devices`.
      n_experts: n.
      rows_per_token: mean number of experts that process a token, as far as it is known.
      n_tokens: t.
      slots_per_token: K of the assignment, None where its slots are in no order.
    """
    if is_local(devices, slots_per_token == rows_per_token):
        return Local(devices, n_experts)
    share = n_tokens * devices.size("tensor") * rows_per_token
    return TRANSPORTS[devices.transport](devices, n_experts, slots_per_token, share)


def _with_buffer(rows):
    return max(8, math.ceil(ROW_BUFFER * rows / 8) * 8)


class Local:
    """All experts are on this device, and all rows are one round."""

    def __init__(self, devices, n_experts):
        """Make the transport."""
        self.devices, self.n_experts = devices, n_experts

    def gather(self, x):
        """What the devices own of tokens whose rows leave from here, `[t, ...]` -> `[T, ...]`."""
        return self.devices.gather(x, "tensor")

    def scatter(self, y):
        """The sum of what the devices computed of each token: `[T, d]` -> `[t, d]`."""
        return self.devices.sum_scatter(y, "tensor")

    def gather_slots(self, assignment):
        """The slots of the tokens that `gather` brings; unused slots and those of experts elsewhere
        have number n or m.
        """
        k = assignment.slots_per_token
        if k is None:
            return assignment
        expert = self.gather(assignment.expert.reshape(-1, k))
        token = jnp.repeat(jnp.arange(expert.shape[0], dtype=jnp.int32), k)
        return Assignment(
            token, expert.reshape(-1), self.gather(assignment.weight.reshape(-1, k)).reshape(-1), k
        )

    def plan(self, assignment):
        """How the slots become rows."""
        return assignment, dispatch.plan_rows(assignment, self.n_experts)

    def rounds(self, plan):
        """How many rounds it takes; an array where it isn't known beforehand."""
        return 1

    def round(self, plan, number):
        """What `dispatch` and the others need to know of a round."""
        return plan

    def groups(self, round):
        """The rows of each expert of this device, as `grouped_matmul` takes them."""
        return round[1].groups

    def dispatch(self, x, round):
        """Rows in expert order: `[T, d]` -> `[R, d]`."""
        return dispatch.dispatch(x, *round)

    def row_values(self, values, round):
        """From slots to rows: `[P]` -> `[R]`."""
        return dispatch.row_values(values, round[1])

    def slot_values(self, values, round, n_slots):
        """From rows to slots: `[R]` -> `[n_slots]`, zero for slots of other rounds or devices."""
        return dispatch.slot_values(values, round[1])

    def complete(self, values):
        """Slot values of all rounds, `[P]`: those of other devices are added."""
        return values

    def combine(self, rows, round, n_tokens):
        """The sum of each token's rows: `[R, d]` -> `[T, d]`, dtype of `rows`."""
        return dispatch.combine(rows, *round, n_tokens)


class _RingPlan(NamedTuple):
    slot: jax.Array  # [P + R] int32, the slot of each row in expert order; P past the end
    end: jax.Array  # [m] int32, where each expert's rows end


class Ring(Local):
    """Every device of the expert axis gets all tokens of its row of the mesh, and computes the rows
    of its own experts.
    """

    def __init__(self, devices, n_experts, slots_per_token, share):
        """Make the transport for `share` rows a device under perfect balance."""
        super().__init__(devices, n_experts // devices.size("expert"))
        self.slots_per_token, self.size = slots_per_token, _with_buffer(share)

    def gather(self, x):
        """Over expert, then over tensor."""
        return self.devices.gather(self.devices.gather(x, "expert"), "tensor")

    def scatter(self, y):
        """The transpose."""
        return self.devices.sum_scatter(self.devices.sum_scatter(y, "tensor"), "expert")

    def gather_slots(self, assignment):
        """With experts numbered from the first of this device."""
        slots = super().gather_slots(assignment)
        expert = slots.expert - self.devices.expert_rank() * self.n_experts
        return slots._replace(
            expert=jnp.where((expert >= 0) & (expert < self.n_experts), expert, self.n_experts)
        )

    def plan(self, assignment):
        """One sort of all slots, those of other devices last."""
        order, _, group_sizes = dispatch.sort_slots(assignment.expert, self.n_experts)
        order = jnp.pad(order, (0, self.size), constant_values=order.shape[0])
        return _RingPlan(order, jnp.cumsum(group_sizes))

    def rounds(self, plan):
        """As many as this device needs: others may need more or fewer."""
        return -(-plan.end[-1] // self.size)

    def round(self, plan, number):
        """`(slot [R], group sizes [m])`; rows past the last group have slot P."""
        start = number * self.size
        within = jnp.clip(plan.end - start, 0, self.size)
        used = jnp.arange(self.size) < within[-1]
        slot = jax.lax.dynamic_slice_in_dim(plan.slot, start, self.size)
        return jnp.where(used, slot, plan.slot[-1]), jnp.diff(within, prepend=0)

    def groups(self, round):
        """See `Local`."""
        return round[1]

    def dispatch(self, x, round):
        """See `Local`."""
        return dispatch.take_rows(x, round[0] // self.slots_per_token)

    def row_values(self, values, round):
        """See `Local`."""
        return values.at[round[0]].get(mode="fill", fill_value=0)

    def slot_values(self, values, round, n_slots):
        """See `Local`."""
        return jnp.zeros(n_slots, values.dtype).at[round[0]].set(values, mode="drop")

    def complete(self, values):
        """Each slot's row is on one device of the expert axis."""
        return self.devices.total(values, ("expert",))

    def combine(self, rows, round, n_tokens):
        """See `Local`."""
        return dispatch.add_rows(rows, round[0] // self.slots_per_token, n_tokens)


class _AllToAllPlan(NamedTuple):
    slot: jax.Array  # [P] int32, slots in expert order
    expert: jax.Array  # [P] int32, their experts
    start: jax.Array  # [E] int32, where the rows for each device begin
    count: jax.Array  # [E] int32, how many they are


class _AllToAllRound(NamedTuple):
    slot: jax.Array  # [R] int32, the slot of each row that leaves, by device; P for none
    order: jax.Array  # [R] int32, which of the rows that arrive comes where in expert order
    inverse: jax.Array  # [R] int32, and back
    group_sizes: jax.Array  # [m] int32
    sent: jax.Array  # [E] int32, rows for each device
    received: jax.Array  # [E] int32, rows from each device


class AllToAll(Local):
    """Each row goes to the device of its expert, in buffers of equal size for every pair of
    devices.
    """

    def __init__(self, devices, n_experts, slots_per_token, share):
        """Make the transport for `share` rows a device under perfect balance."""
        super().__init__(devices, n_experts // devices.size("expert"))
        self.slots_per_token = slots_per_token
        self.n_devices = devices.size("expert")
        self.pair_size = _with_buffer(share / self.n_devices)

    def plan(self, assignment):
        """One sort of the slots: by device, and by expert within."""
        order, _, group_sizes = dispatch.sort_slots(
            assignment.expert, self.n_devices * self.n_experts
        )
        count = group_sizes.reshape(self.n_devices, -1).sum(axis=1)
        return _AllToAllPlan(order, assignment.expert[order], jnp.cumsum(count) - count, count)

    def rounds(self, plan):
        """As many as the fullest pair of devices needs: all take part in each."""
        return self.devices.largest(-(-plan.count.max() // self.pair_size))

    def round(self, plan, number):
        """See `Local`."""
        n_slots = plan.slot.shape[0]
        within = number * self.pair_size + jnp.arange(self.pair_size)
        used = within < plan.count[:, None]
        row = jnp.where(used, plan.start[:, None] + within, n_slots)
        slot = plan.slot.at[row].get(mode="fill", fill_value=n_slots)
        first = jnp.arange(self.n_devices, dtype=jnp.int32)[:, None] * self.n_experts
        expert = jnp.where(used, plan.expert.at[row].get(mode="clip") - first, self.n_experts)
        arrived = self.devices.exchange(expert, 0, 0).reshape(-1)
        order, inverse, group_sizes = dispatch.sort_slots(arrived, self.n_experts)
        sent = jnp.clip(plan.count - number * self.pair_size, 0, self.pair_size)
        received = self.devices.exchange(sent, 0, 0)
        return _AllToAllRound(slot.reshape(-1), order, inverse, group_sizes, sent, received)

    def groups(self, round):
        """See `Local`."""
        return round.group_sizes

    def dispatch(self, x, round):
        """See `Local`."""
        rows = dispatch.take_rows(x, round.slot // self.slots_per_token)
        rows = self.devices.exchange_rows(rows, round.sent, round.received)
        return permute(rows, round.order, round.inverse)

    def row_values(self, values, round):
        """See `Local`."""
        sent = values.at[round.slot].get(mode="fill", fill_value=0)
        return permute(self.devices.exchange(sent, 0, 0), round.order, round.inverse)

    def slot_values(self, values, round, n_slots):
        """See `Local`."""
        returned = self.devices.exchange(permute(values, round.inverse, round.order), 0, 0)
        return jnp.zeros(n_slots, values.dtype).at[round.slot].set(returned, mode="drop")

    def combine(self, rows, round, n_tokens):
        """See `Local`."""
        rows = permute(rows, round.inverse, round.order)
        rows = self.devices.exchange_rows(rows, round.received, round.sent)
        return dispatch.add_rows(rows, round.slot // self.slots_per_token, n_tokens)


TRANSPORTS = {"ring": Ring, "all_to_all": AllToAll}


def sum_over_rounds(function, first, count, plan, args):
    """`first` plus `function(plan, number, args)` of rounds 1 to `count - 1`.

    The number of rounds is known only when they run, so they are a loop without a derivative of its
      own: the backward pass
    runs each round again and keeps nothing of it.

    Args:
      function: of static things, `plan`, `number` and `args` alone; it closes over no arrays.
      first: an array, the result of round 0.
      count: int, or an int32 array.
      plan: arrays without a gradient.
      args: arrays with one.
    """
    if isinstance(count, int) or _first_round_only:
        return first
    return (first + _further_rounds(function, plan, count, args)).astype(first.dtype)


_first_round_only = []


@contextlib.contextmanager
def first_round_only():
    """Traces programs without further rounds: right for balanced loads alone, and meant for
    counting what those cost.
    """
    _first_round_only.append(True)
    jax.clear_caches()  # what was traced before has them
    try:
        yield
    finally:
        _first_round_only.pop()
        jax.clear_caches()


def _loop(function, count, like):
    """The sum of `function(number)`, in float32 at least."""
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), like
    )
    return jax.lax.fori_loop(
        1, count, lambda number, total: jax.tree.map(jnp.add, total, function(number)), zeros
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(function, plan, count, args):
    with jax.named_scope("further_rounds"):
        shape = jax.eval_shape(lambda: function(plan, 1, args))
        return _loop(lambda number: function(plan, number, args), count, shape)


def _further_rounds_backward(function, residuals, g):
    plan, count, args = residuals
    with jax.named_scope("further_rounds"):

        def gradient(number):
            result, pull_back = jax.vjp(partial(function, plan, number), args)
            return pull_back(g.astype(result.dtype))[0]

        d_args = _loop(gradient, count, args)
    return None, None, jax.tree.map(lambda d, a: d.astype(a.dtype), d_args, args)


_further_rounds.defvjp(
    lambda function, plan, count, args: (
        _further_rounds(function, plan, count, args),
        (plan, count, args),
    ),
    _further_rounds_backward,
)
