"""The pipeline over a mesh: all collectives are here, and no other file has one.

A layer of experts runs inside one `jax.shard_map`. Every device owns `t` tokens, those of its sequences and positions:
sequences are split over (data, fsdp, expert), positions over tensor. Expert weights are split over expert (which experts),
tensor (their width) and fsdp (d_model, or the rank of Wup), and are gathered over fsdp where they are used.

How rows reach their experts is a transport, with one set of methods:

    Local      all experts are here. Tokens are gathered over tensor, and outputs summed and scattered back.
    Ring       tokens are gathered over expert and tensor; every device computes the rows of its own experts; outputs are
               summed and scattered home. It moves t d (E - 1) numbers to a device and as many back, whatever is chosen.
    AllToAll   each row goes to the device of its expert and back. It moves about K t d numbers to a device and as many back.

Nothing is dropped, and memory is bounded: a device takes its rows in rounds of R rows, `ROW_BUFFER` times its share under
perfect balance. The first round is computed like any layer. Where the load is so uneven that rows are left, further rounds
follow, as many as the fullest device needs; they keep nothing for the backward pass and are computed again there. So the
memory for rows stays at about two rounds even where all tokens choose the experts of one device.

T tokens of a device once gathered, t tokens it owns, d model width, n experts, m experts of a device, K slots of a token,
P slots, R rows of a round, E devices along expert.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aoe_jax.experts import dispatch
from aoe_jax.experts.permute import permute
from aoe_jax.experts.selection import Assignment
from aoe_jax.sharding import MESH_AXES, RULES, parameter_axes

ROW_BUFFER = 1.25
GATHERED_WEIGHT = "gathered_weight"
RAGGED_PLATFORMS = ("TPU v5", "TPU v6 lite")  # v5p and v6e; it compiles neither for v5e nor for CPU


@dataclass(frozen=True)
class Devices:
    """The devices that a layer runs on, seen from one of them: inside `jax.shard_map`, or a single device without a mesh."""

    sizes: tuple = (1, 1, 1, 1)  # along MESH_AXES
    transport: str = "ring"
    shape: tuple = ()  # of the tokens that a device owns: [b, s], or [t]; where a function needs their order

    def size(self, axis):
        """Devices along a mesh axis."""
        return self.sizes[MESH_AXES.index(axis)]

    def gather(self, x, axis, dimension=0):
        """Concatenates the pieces of `x` over a mesh axis."""
        return jax.lax.all_gather(x, axis, axis=dimension, tiled=True) if self.size(axis) > 1 else x

    def sum_scatter(self, x, axis, dimension=0):
        """Sums `x` over a mesh axis and keeps this device's piece; the transpose of `gather`."""
        return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True) if self.size(axis) > 1 else x

    def exchange(self, x, split, concatenate):
        """`all_to_all` over the expert axis."""
        if self.size("expert") == 1:
            return x
        return jax.lax.all_to_all(x, "expert", split_axis=split, concat_axis=concatenate, tiled=True)

    def exchange_rows(self, rows, sent, received):
        """`[E B, d]`, B for each device of the expert axis, the first `sent [E]` of them in use -> as many from each.

        Where the platform has `ragged_all_to_all`, only rows in use are sent; elsewhere, whole buffers.
        """
        if self.has_ragged:
            return _ragged_exchange(rows, sent, received)
        return self.exchange(rows, 0, 0)

    @property
    def has_ragged(self):
        """Whether `ragged_all_to_all` compiles for these devices."""
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        return device.device_kind in RAGGED_PLATFORMS

    def total(self, x):
        """The sum over all devices."""
        axes = tuple(axis for axis in MESH_AXES if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x

    def largest(self, x):
        """The maximum over all devices."""
        axes = tuple(axis for axis in MESH_AXES if self.size(axis) > 1)
        return jax.lax.pmax(x, axes) if axes else x

    def sum_over_experts(self, x):
        """The sum over the expert axis."""
        return jax.lax.psum(x, "expert") if self.size("expert") > 1 else x

    def expert_rank(self):
        """Where this device lies on the expert axis."""
        return jax.lax.axis_index("expert") if self.size("expert") > 1 else 0

    def gather_weight(self, name, w, dtype=None):
        """A weight, whole along what is split over fsdp; in `dtype` if it is given, from before it is sent.

        Its gradient is summed over the devices in the dtype of `w`.
        """
        dtype = dtype or w.dtype
        axes = [axis is not None and getattr(RULES, axis) == "fsdp" for axis in parameter_axes(name, w.ndim)]
        if self.size("fsdp") == 1 or not any(axes):
            return w.astype(dtype)
        return checkpoint_name(_gather_cast(w, dtype, axes.index(True)), GATHERED_WEIGHT)

    def score(self, function, x, w_down):
        """Scores of the tokens of this device by all experts.

        With `all_to_all`, the Wdown of all experts are gathered where they are smaller than the tokens of the expert axis.
        Elsewhere tokens are gathered, each device scores for its own experts, and the scores return.

        Args:
          function: `(x [T, d], w_down [m, d, r]) -> arrays [T or fewer, m]`, as a tuple.
          x: `[t, d]`. w_down: `[m, d, r]` of this device's experts, its piece of d_model.

        Returns:
          The arrays, `[t or fewer, n]`.
        """
        if self.size("fsdp") > 1:
            w_down = self.gather_weight("w_down", w_down, x.dtype)
        if self.transport == "all_to_all" and w_down.shape[0] * w_down.shape[2] <= x.shape[0]:
            return function(x, self.gather(w_down.astype(x.dtype), "expert"))
        of_own_experts = function(self.gather(x, "expert"), w_down)
        return tuple(self.exchange(a, split=0, concatenate=1) for a in of_own_experts)

    def all_tokens(self, values):
        """`[t, ...]` of every device as `[all tokens, ...]`, in the order of the batch: `[B, S]`, flattened."""
        if self.total_size == 1:
            return values
        trailing = values.shape[1:]
        values = self.gather(values.reshape(*self.shape, *trailing), "tensor", len(self.shape) - 1)
        for axis in ("expert", "fsdp", "data"):
            values = self.gather(values, axis)
        return values.reshape(-1, *trailing)

    def own_tokens(self, values):
        """The inverse: `[all tokens, ...]` -> `[t, ...]`."""
        if self.total_size == 1:
            return values
        split = self.sizes[:3], self.sizes[3:]
        rank = [jax.lax.axis_index(axis) for axis in MESH_AXES]
        batch_rank = (rank[0] * split[0][1] + rank[1]) * split[0][2] + rank[2]
        if len(self.shape) == 1:
            return jax.lax.dynamic_slice_in_dim(
                values, (batch_rank * split[1][0] + rank[3]) * self.shape[0], self.shape[0]
            )
        b, s = self.shape
        values = values.reshape(b * math.prod(split[0]), s * split[1][0], *values.shape[1:])
        values = jax.lax.dynamic_slice_in_dim(values, batch_rank * b, b)
        return jax.lax.dynamic_slice_in_dim(values, rank[3] * s, s, axis=1).reshape(-1, *values.shape[2:])

    @property
    def total_size(self):
        """All devices."""
        return math.prod(self.sizes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_cast(w, dtype, dimension):
    return jax.lax.all_gather(w.astype(dtype), "fsdp", axis=dimension, tiled=True)


_gather_cast.defvjp(
    lambda w, dtype, dimension: (_gather_cast(w, dtype, dimension), jnp.zeros((), w.dtype)),
    lambda dtype, dimension, like, g: (
        jax.lax.psum_scatter(g.astype(like.dtype), "fsdp", scatter_dimension=dimension, tiled=True),
    ),
)


def ragged_offsets(rank, n_devices, n_rows):
    """`(input offsets, output offsets)` `[E]` of `ragged_all_to_all` between buffers of equal size for each device.

    Row blocks lie by receiver before, by sender after: what device `rank` sends lands in the block `rank` of each receiver.
    """
    block = n_rows // n_devices
    return jnp.arange(n_devices, dtype=jnp.int32) * block, jnp.full(n_devices, rank * block, jnp.int32)


@jax.custom_vjp
def _ragged_exchange(rows, sent, received):
    n_devices = sent.shape[0]
    start, landing = ragged_offsets(jax.lax.axis_index("expert"), n_devices, rows.shape[0])
    out = jnp.zeros_like(rows)  # rows that nobody sends stay zero
    return jax.lax.ragged_all_to_all(rows, out, start, sent, landing, received, axis_name="expert")


_ragged_exchange.defvjp(
    lambda rows, sent, received: (_ragged_exchange(rows, sent, received), (sent, received)),
    lambda sizes, g: (_ragged_exchange(g, sizes[1], sizes[0]), None, None),
)


def over_mesh(function, in_specs, out_specs, transport="ring"):
    """`function(devices, *args)` on every device of the mesh in context; without a mesh, on the arrays as they are.

    Args:
      function: gets this device's pieces of the arguments; results that aren't split must be the same everywhere.
      in_specs: a tree of `PartitionSpec` for each argument, see `token_spec` and `weight_specs`.
      out_specs: the same for the result.
      transport: `MeshConfig.transport`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return partial(function, Devices(transport=transport))
    if set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(f"a mesh of axes {MESH_AXES} is wanted, see aoe_jax.sharding.make_mesh; got {mesh.axis_names}")
    devices = Devices(tuple(mesh.shape[axis] for axis in MESH_AXES), transport)
    idle = tuple(axis for axis in MESH_AXES if devices.size(axis) == 1)
    in_specs = jax.tree.map(partial(_name_idle_axes, idle), in_specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    if devices.size("fsdp") > 1:
        # Layers are scanned, so the backward pass is a loop of its own, and within it gathering twice is gathering once.
        function = jax.checkpoint(function, policy=_all_but_gathered_weights, static_argnums=0, prevent_cse=False)
    # check_vma: Pallas kernels say nothing of how their results vary over the mesh.
    return jax.shard_map(partial(function, devices), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _name_idle_axes(idle, spec):
    """The same split, with axes of one device named in it: over axes that aren't, gradients would be summed."""
    named = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    rest = tuple(axis for axis in idle if axis not in named)
    if not spec or not rest:
        return spec
    first = () if spec[0] is None else (spec[0],) if isinstance(spec[0], str) else spec[0]
    return PartitionSpec((*first, *rest), *spec[1:])


def _all_but_gathered_weights(primitive, *_, **params):
    """A checkpoint policy: weights are gathered again in the backward pass, never kept whole."""
    inner = params["call_jaxpr"].eqns if primitive.name == "custom_vjp_call" else ()
    gathers = any(eqn.primitive.name == "all_gather" and "fsdp" in eqn.params["axis_name"] for eqn in inner)
    return not gathers and params.get("name") != GATHERED_WEIGHT


def token_spec(ndim, *trailing):
    """Tokens `[B, S]`, split by sequence and by position, or `[T]`, split over both; then axes that are whole."""
    batch, sequence = RULES.spec("batch", "sequence")
    tokens = (batch, sequence) if ndim == 2 else ((*batch, sequence),)
    return PartitionSpec(*tokens, *trailing)


def weight_specs(weights):
    """How weights are split, by their names."""
    return {name: RULES.spec(*parameter_axes(name, w.ndim)) for name, w in weights.items()}


def sum_over_tokens(function, hidden, table, targets, weights):
    """`function(hidden [N, d], table [V, d], targets [N], weights [N]) -> []`, summed over the tokens of all devices.

    `hidden [B, S, d]`, `targets` and `weights` `[B, S]`.
    """

    def local(devices, hidden, table, targets, weights):
        table = devices.gather_weight("embedding", table)
        return devices.total(
            function(hidden.reshape(-1, hidden.shape[-1]), table, targets.reshape(-1), weights.reshape(-1))
        )

    table_spec = weight_specs({"embedding": table})["embedding"]
    in_specs = (token_spec(2, None), table_spec, token_spec(2), token_spec(2))
    return over_mesh(local, in_specs, PartitionSpec())(hidden, table, targets, weights)


def embed(table, tokens, dtype):
    """`table [V, d]`, `tokens [B, S]` -> `[B, S, d]` in `dtype`, split like the tokens of the layers."""

    def local(devices, table, tokens):
        return jnp.take(devices.gather_weight("embedding", table).astype(dtype), tokens, axis=0)

    in_specs = (weight_specs({"embedding": table})["embedding"], token_spec(2))
    return over_mesh(local, in_specs, token_spec(2, None))(table, tokens)


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
        """The slots of the tokens that `gather` brings; unused slots and those of experts elsewhere have number n or m."""
        k = assignment.slots_per_token
        if k is None:
            return assignment
        expert = self.gather(assignment.expert.reshape(-1, k))
        token = jnp.repeat(jnp.arange(expert.shape[0], dtype=jnp.int32), k)
        return Assignment(token, expert.reshape(-1), self.gather(assignment.weight.reshape(-1, k)).reshape(-1), k)

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
    """Every device of the expert axis gets all tokens of its row of the mesh, and computes the rows of its own experts."""

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
        return slots._replace(expert=jnp.where((expert >= 0) & (expert < self.n_experts), expert, self.n_experts))

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
        return self.devices.sum_over_experts(values)

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
    """Each row goes to the device of its expert, in buffers of equal size for every pair of devices."""

    def __init__(self, devices, n_experts, slots_per_token, share):
        """Make the transport for `share` rows a device under perfect balance."""
        super().__init__(devices, n_experts // devices.size("expert"))
        self.slots_per_token = slots_per_token
        self.n_devices = devices.size("expert")
        self.pair_size = _with_buffer(share / self.n_devices)

    def plan(self, assignment):
        """One sort of the slots: by device, and by expert within."""
        order, _, group_sizes = dispatch.sort_slots(assignment.expert, self.n_devices * self.n_experts)
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

    The number of rounds is known only when they run, so they are a loop without a derivative of its own: the backward pass
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
    """Traces programs without further rounds: right for balanced loads alone, and meant for counting what those cost."""
    _first_round_only.append(True)
    jax.clear_caches()  # what was traced before has them
    try:
        yield
    finally:
        _first_round_only.pop()
        jax.clear_caches()


def _loop(function, count, like):
    """The sum of `function(number)`, in float32 at least."""
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), like)
    return jax.lax.fori_loop(1, count, lambda number, total: jax.tree.map(jnp.add, total, function(number)), zeros)


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
    lambda function, plan, count, args: (_further_rounds(function, plan, count, args), (plan, count, args)),
    _further_rounds_backward,
)
