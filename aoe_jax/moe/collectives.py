"""All collectives between the devices of a mesh.

A layer runs inside one `jax.shard_map`. Every device owns T tokens: sequences are split over (data,
fsdp, expert), positions over tensor. Experts are split over the expert axis. The weights of each
expert are split over tensor by width and over fsdp by d_model (W_gate_up: by rank), and are
gathered over fsdp where they are used.
`transports.py` sends rows to their experts.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aoe_jax.moe.grouped_matmul.groups import NOWHERE, take
from aoe_jax.moe.scoring import safe_root
from aoe_jax.parameters import EXPERTS, Parameter
from aoe_jax.sharding import AXES, MESH_AXES, RULES, MeshAxes, count_slices, spec_of, target_device

GATHERED_WEIGHT = "gathered_weight"
# The least devices of a whole slice for which libtpu 0.0.52 compiles a collective to an all-reduce.
_ALL_REDUCED_FROM = {
    "gather": {"TPU v4": 64, "TPU v5": 64, "TPU7x": 64},
    "scatter": {"TPU v4": 8, "TPU v5": 8},  # and on v5e and v6e for square slices
}
# `ragged_all_to_all` fails on CPU and on most slices of v5e. On GPU it is slow or wrong in some
# versions of XLA.
RAGGED_DEVICES = ("TPU v4", "TPU v5", "TPU v6 lite", "TPU7x")


@dataclass(frozen=True)
class Devices:
    """One device of a mesh inside `jax.shard_map`, or a single device, and its collectives."""

    sizes: tuple = (1, 1, 1, 1)  # number of devices along each of MESH_AXES
    transport: str = "ring"
    remat: str = "none"  # `model.remat`
    shape: tuple = ()  # leading shape of this device's tokens, `(sequences, positions)` or `(T,)`
    axes: MeshAxes = AXES

    def size(self, axis):
        return self.sizes[MESH_AXES.index(axis)]

    def rank(self, axis):
        """The index of this device along a mesh axis."""
        return jax.lax.axis_index(self.axes.collective(axis)) if self.size(axis) > 1 else 0

    def gather(self, x, axis, dimension=0):
        """Concatenates the shards of `x` over a mesh axis."""
        if self.size(axis) == 1:
            return x
        return jax.lax.all_gather(x, self.axes.collective(axis), axis=dimension, tiled=True)

    def sum_scatter(self, x, axis, dimension=0):
        """Sums `x` over a mesh axis and keeps this device's shard; the transpose of `gather`."""
        if self.size(axis) == 1:
            return x
        name = self.axes.collective(axis)
        return jax.lax.psum_scatter(x, name, scatter_dimension=dimension, tiled=True)

    def exchange(self, x, split, concatenate, axis="expert"):
        if self.size(axis) == 1:
            return x
        name = self.axes.collective(axis)
        return jax.lax.all_to_all(x, name, split_axis=split, concat_axis=concatenate, tiled=True)

    def exchange_rows(self, rows, sent, received):
        """Sends rows along the expert axis: `[N C, ...]` -> `[N C, ...]`, at most C to each device.

        `sent` are the `Segments` that this device sends, and `received` the segments that return
        the received rows. On `RAGGED_DEVICES` only these rows are sent, and other rows of the
        result are undefined. On other devices, and for numbers `[N C]`, each pair of devices
        exchanges C rows, and other rows of the result are zero.
        """
        is_ragged = rows.ndim > 1 and target_device().device_kind in RAGGED_DEVICES
        return _exchange_rows(rows, (sent, received), self.axes.collective("expert"), is_ragged)

    @property
    def sends_rows(self):
        """Whether rows are sent to the devices of their experts by `all_to_all`."""
        return self.transport == "all_to_all" and self.size("expert") > 1

    def total(self, x, axes=MESH_AXES):
        """The sum of `x` over mesh axes."""
        names = self._names(axes)
        return jax.lax.psum(x, names) if names else x

    def from_first(self, x):
        """Broadcasts `x` from the first device along tensor to all others."""
        if self.size("tensor") == 1:
            return x
        return self.total(jnp.where(self.rank("tensor") == 0, x, 0), ("tensor",))

    def largest(self, x):
        names = self._names(MESH_AXES)
        return jax.lax.pmax(x, names) if names else x

    def _names(self, axes):
        return tuple(name for axis in axes if self.size(axis) > 1 for name in self.axes.names(axis))

    def piece(self, x, axis, dimension=0):
        """The inverse of `gather`: this device's shard of a whole array."""
        if self.size(axis) == 1:
            return x
        size = x.shape[dimension] // self.size(axis)
        return jax.lax.dynamic_slice_in_dim(x, self.rank(axis) * size, size, dimension)

    def gather_weight(self, parameter: Parameter, w, dtype=None, sum_dtype=None):
        """Gathers a weight over fsdp.

        The weight is cast to `dtype` (None: no cast) before it is sent. Its gradient is summed over
        the devices in `sum_dtype` (None: the dtype of `w`).
        """
        dtype = dtype or w.dtype
        split = parameter.split[-w.ndim :]
        over_fsdp = [axis is not None and RULES[axis] == "fsdp" for axis in split]
        if self.size("fsdp") == 1 or not any(over_fsdp):
            return w.astype(dtype)
        name = self.axes.collective("fsdp")
        gathered = _gather_cast(w, dtype, name, over_fsdp.index(True), sum_dtype)
        return checkpoint_name(gathered, GATHERED_WEIGHT)

    def gather_experts(self, parameter: Parameter, w, dtype):
        """Casts a weight of experts to `dtype` and gathers it over the axes fsdp and expert."""
        if self.size("expert") == 1:
            return self.gather_weight(parameter, w, dtype)
        whole = self.gather_weight(parameter, w)
        name = self.axes.collective("expert")
        return checkpoint_name(_gather_cast(whole, dtype, name, 0), GATHERED_WEIGHT)

    def without_whole_weights(self, function, gathers_experts=False):
        """Wraps a function of arrays so that its backward pass gathers whole weights again.

        An inner `jax.checkpoint` would keep what this policy keeps, so parts of `function` that
        recompute arrays use custom derivatives. No barrier (`prevent_cse`) is needed between a
        gather and its repetition, because the backward pass of scanned layers is its own loop. With
        `model.remat="layer"` or "full" the whole layer is recomputed: the result is `function`.
        `gathers_experts` says whether `function` calls `gather_experts`.
        """
        gathers_experts = self.sends_rows or (gathers_experts and self.size("expert") > 1)
        if self.remat in ("layer", "full") or (self.size("fsdp") == 1 and not gathers_experts):
            return function
        return jax.checkpoint(function, policy=_all_but_gathered_weights, prevent_cse=False)

    def score(self, function, x, w_score):
        """AoE's scores of a device's tokens for all experts: a tuple of arrays `[T or fewer, n]`.

        Tokens are gathered over the expert axis. Each device computes their scores for its own
        experts and sends the scores back. With the transport `all_to_all`, if `w_score` is smaller
        than the tokens, `w_score` is gathered and the tokens are not. `function` computes scores
        from tokens `[T, d]` and `w_score [n, d, r]`; the argument `w_score` is this device's shard.
        """

        def scores_by_all(x, w):
            if self.size("fsdp") > 1:
                w = self.gather_weight(EXPERTS["w_gate_down"], w, x.dtype)
            if self.sends_rows and w.shape[0] * w.shape[2] <= x.shape[0]:
                name = self.axes.collective("expert")
                wide = jnp.promote_types(x.dtype, jnp.float32)
                of_all = _gather_cast(w, x.dtype, name, 0, wide)
                return function(x, checkpoint_name(of_all, GATHERED_WEIGHT))
            by_own_experts = function(self.gather(x, "expert"), w)
            return tuple(self.exchange(a, split=0, concatenate=1) for a in by_own_experts)

        return self.without_whole_weights(scores_by_all)(x, w_score)

    def matrix_norms(self, w):
        """Frobenius norms `[n]` of all experts, from this device's shard of `w [n, d, r]`."""
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        squares = self.total(jnp.sum(w * w, axis=(1, 2)), ("fsdp",))
        return self.gather(safe_root(squares), "expert")

    def check_sequences(self):
        """Raises ValueError for flat tokens `[T, d]` on a mesh: their sequences are unknown."""
        if len(self.shape) == 1 and self.total_size > 1:
            raise ValueError(
                "on a mesh this layer needs sequences [B, S, d]; "
                f"it got tokens of shape {self.shape}"
            )

    def whole_sequences(self, values):
        """Gathers whole sequences over the tensor axis: `[T, ...]` -> `[B, S, ...]`."""
        self.check_sequences()
        return self.gather(values.reshape(-1, self.shape[-1], *values.shape[1:]), "tensor", 1)

    def all_tokens(self, values):
        """The values of all tokens, in the order of the batch: `[T, ...]` -> `[B S, ...]`."""
        if self.total_size == 1:
            return values
        trailing = values.shape[1:]
        values = self.gather(values.reshape(*self.shape, *trailing), "tensor", len(self.shape) - 1)
        for axis in ("expert", "fsdp", "data"):
            values = self.gather(values, axis)
        return values.reshape(-1, *trailing)

    def own_tokens(self, values):
        """The inverse of `all_tokens`: `[B S, ...]` -> `[T, ...]`."""
        if self.total_size == 1:
            return values
        rank, n_ranks = self.rank("tensor"), self.size("tensor")
        if len(self.shape) == 1:
            first = (self._batch_rank() * n_ranks + rank) * self.shape[0]
            return jax.lax.dynamic_slice_in_dim(values, first, self.shape[0])
        b, s = self.shape
        trailing = values.shape[1:]
        values = values.reshape(b * self.batch_pieces, s * n_ranks, *trailing)
        values = self.piece(self.own_sequences(values), "tensor", 1)
        return values.reshape(-1, *trailing)

    def own_sequences(self, values):
        """This device's shard of the values `[B, ...]` of all sequences."""
        if self.batch_pieces == 1:
            return values
        b = values.shape[0] // self.batch_pieces
        return jax.lax.dynamic_slice_in_dim(values, self._batch_rank() * b, b)

    @property
    def batch_pieces(self):
        """The number of devices that sequences are split over."""
        return math.prod(self.sizes[:3])

    def _batch_rank(self):
        data, fsdp, expert = map(self.rank, MESH_AXES[:3])
        return (data * self.size("fsdp") + fsdp) * self.size("expert") + expert

    @property
    def total_size(self):
        return math.prod(self.sizes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather_cast(w, dtype, axis, dimension, sum_dtype=None):
    return gather_in_stages(w.astype(dtype), axis, dimension)


def _gather_cast_backward(dtype, axis, dimension, sum_dtype, like, g):
    g = g.astype(sum_dtype or like.dtype)
    return (sum_gradients(g, axis, dimension).astype(like.dtype),)


_gather_cast.defvjp(
    lambda w, *how: (_gather_cast(w, *how), jnp.zeros((), w.dtype)), _gather_cast_backward
)


def gather_in_stages(x, axis, dimension):
    """Concatenates the shards of `x` over a mesh axis of several devices."""
    for ranks in _stages(axis, "gather"):
        x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True, axis_index_groups=ranks)
    return x


def sum_gradients(g, axis, dimension):
    """Sums `g` over a mesh axis of several devices and keeps this device's shard of `dimension`:
    the transpose of `gather_in_stages`.
    """
    how = {"scatter_dimension": dimension, "tiled": True}
    for ranks in reversed(_stages(axis, "scatter")):
        g = jax.lax.psum_scatter(g, axis, axis_index_groups=ranks, **how)
    return g


def _stages(axis, kind):
    """The `axis_index_groups` of each stage of a gather over a mesh axis; `[None]` is one stage.

    The TPU compiler turns a gather, or a sum and scatter, over some whole slices into an
    all-reduce, which sends twice the bytes, but not over parts of a slice. So there are two stages,
    over 4 devices that are neighbours in the order of the shards, and over every fourth device.
    """
    n, chip = jax.lax.axis_size(axis), target_device().device_kind
    of_slice = jax.sharding.get_abstract_mesh().size // count_slices(jax.devices())
    is_square = chip in ("TPU v5 lite", "TPU v6 lite") and n in (16, 64, 256)
    all_reduced = n >= _ALL_REDUCED_FROM[kind].get(chip, math.inf)
    all_reduced |= kind == "scatter" and is_square
    return two_stages(n) if n == of_slice and n % 4 == 0 and all_reduced else [None]


def two_stages(n):
    """`axis_index_groups` of two stages over `n` devices."""
    ranks = np.arange(n).reshape(-1, 4)
    return [ranks.tolist(), ranks.T.tolist()]


class Segments(NamedTuple):
    """Rows that a device sends, `[N, S]` int32: to each of N devices, S runs of adjacent rows."""

    start: jax.Array  # the first row of a run
    size: jax.Array  # its number of rows
    landing: jax.Array  # its first row in the result of the other device


def moved(n_rows, start, size, landing):
    """Where runs of rows come from: the position of each row `[n_rows]` if runs of `size` rows move
    from `start` to `landing`; `NOWHERE` for a row that no run reaches.
    """
    row = jnp.arange(n_rows, dtype=jnp.int32)[:, None]
    start, size, landing = (a.reshape(-1) for a in (start, size, landing))
    inside = (row >= landing) & (row < landing + size)
    found = jnp.where(inside, start - landing + row + 1, 0).sum(axis=1)
    return jnp.where(found > 0, found - 1, NOWHERE)


def before(sizes):
    """The sum of the sizes before each one on the last axis: an exclusive `cumsum`."""
    return jnp.cumsum(sizes, axis=-1) - sizes


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange_rows(rows, segments, axis, is_ragged):
    sent, received = segments
    if is_ragged:
        where = (a.reshape(-1) for a in (sent.start, sent.size, sent.landing, received.size))
        out = jax.lax.empty(rows.shape, rows.dtype)
        return jax.lax.ragged_all_to_all(rows, out, *where, axis_name=axis)
    n_rows, n_devices = rows.shape[0], sent.size.shape[0]
    first = jnp.arange(n_devices, dtype=jnp.int32)[:, None] * (n_rows // n_devices)
    buffers = take(rows, moved(n_rows, sent.start, sent.size, first + before(sent.size)))
    buffers = jax.lax.all_to_all(buffers, axis, 0, 0, tiled=True)
    in_buffers = first + before(received.size)
    return take(buffers, moved(n_rows, in_buffers, received.size, received.start))


_exchange_rows.defvjp(
    lambda rows, segments, *how: (_exchange_rows(rows, segments, *how), segments),
    lambda axis, is_ragged, segments, g: (_exchange_rows(g, segments[::-1], axis, is_ragged), None),
)


def over_mesh(function, in_specs, out_specs, transport="ring", remat="none", axes=AXES):
    """Wraps `function(devices, *args)` to run on every device of the mesh in context, on its shards
    of `args`. Without a mesh, and inside another `jax.shard_map`, `function` gets `args` unchanged.

    `in_specs` has a tree of `PartitionSpec` for each argument (`token_spec`, `weight_specs`), and
    `out_specs` is the tree of the result. A result that is not split must be equal on all devices.
    Raises the ValueError of `MeshAxes.sizes`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = Devices(axes.sizes(mesh), transport, remat, axes=axes)
    if mesh.empty or mesh.manual_axes:
        return partial(function, devices)
    idle = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1)
    in_specs, out_specs = (
        jax.tree.map(axes.spec, specs, is_leaf=_is_spec) for specs in (in_specs, out_specs)
    )
    in_specs = jax.tree.map(partial(_name_idle_axes, idle), in_specs, is_leaf=_is_spec)
    # No check_vma, because Pallas kernels do not declare how their results vary over the mesh.
    run = jax.shard_map(
        partial(function, devices), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    if not mesh.explicit_axes:
        return run
    split = partial(jax.tree.map, lambda spec, a: jax.sharding.reshard(a, spec), is_leaf=_is_spec)
    return lambda *args: run(*(split(spec, a) for spec, a in zip(in_specs, args, strict=True)))


def _is_spec(value):
    return isinstance(value, PartitionSpec)


def _name_idle_axes(idle, spec):
    """Adds the axes of size 1 to a spec, because JAX sums gradients over axes that specs omit."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    named = {axis for entry in entries for axis in entry}
    rest = tuple(axis for axis in idle if axis not in named)
    if not entries or not rest:
        return spec
    return PartitionSpec((*entries[0], *rest), *spec[1:])


def _all_but_gathered_weights(primitive, *_, **params):
    """A checkpoint policy that keeps everything except gathered weights."""
    inner = params["call_jaxpr"].eqns if primitive.name == "custom_vjp_call" else ()
    gathers = any(eqn.primitive.name == "all_gather" for eqn in inner)
    return not gathers and params.get("name") != GATHERED_WEIGHT


def token_spec(n_axes, *trailing):
    """The `PartitionSpec` of tokens `[B, S]` or, if `n_axes` is 1, `[T]`, with `trailing` axes."""
    batch, sequence = spec_of("batch", "sequence")
    tokens = (batch, sequence) if n_axes == 2 else ((*batch, sequence),)
    return PartitionSpec(*tokens, *trailing)


def weight_specs(parameters, weights):
    """The `PartitionSpec` of each weight by name, as `parameters` declares it."""
    return {name: spec_of(*parameters[name].split[-w.ndim :]) for name, w in weights.items()}
