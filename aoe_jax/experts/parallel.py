"""The pipeline over a mesh: what a device does together with others. All collectives are here, and
no other file has one.

A layer runs inside one `jax.shard_map`. Every device owns `t` tokens, those of its sequences and
positions: sequences are split over (data, fsdp, expert), positions over tensor. Expert weights are
split over expert (which experts), tensor (their width) and fsdp (d_model, or the rank of Wup), and
are gathered over fsdp where they are used. How rows reach their experts is in `transport.py`.

T tokens of a device once gathered, t tokens it owns, d model width, n experts, m experts of a
device, r low rank (d_low), N tokens, V vocabulary, B rows for each device of the expert axis, E
devices along it.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aoe_jax.experts.scoring import safe_root
from aoe_jax.sharding import MESH_AXES, RULES, parameter_axes

GATHERED_WEIGHT = "gathered_weight"
RAGGED_PLATFORMS = ("TPU v5", "TPU v6 lite")  # v5p and v6e; it compiles neither for v5e nor for CPU


@dataclass(frozen=True)
class Devices:
    """The devices that a layer runs on, seen from one of them: inside `jax.shard_map`, or a single
    device without a mesh.
    """

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
        return (
            jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
            if self.size(axis) > 1
            else x
        )

    def exchange(self, x, split, concatenate, axis="expert"):
        """`all_to_all` over a mesh axis."""
        if self.size(axis) == 1:
            return x
        return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=concatenate, tiled=True)

    def exchange_rows(self, rows, sent, received):
        """`[E B, d]`, B for each device of the expert axis, the first `sent [E]` of them in use ->
        as many from each.

        Where the platform has `ragged_all_to_all`, only rows in use are sent; elsewhere, whole
        buffers.
        """
        if self.has_ragged:
            return _ragged_exchange(rows, sent, received)
        return self.exchange(rows, 0, 0)

    @property
    def sends_rows(self):
        """Whether rows go to the devices of their experts, by `all_to_all`."""
        return self.transport == "all_to_all" and self.size("expert") > 1

    @property
    def has_ragged(self):
        """Whether `ragged_all_to_all` compiles for these devices."""
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        return device.device_kind in RAGGED_PLATFORMS

    def total(self, x, axes=MESH_AXES):
        """The sum over all devices, or over those along some axes."""
        axes = tuple(axis for axis in axes if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x

    def largest(self, x):
        """The maximum over all devices."""
        axes = tuple(axis for axis in MESH_AXES if self.size(axis) > 1)
        return jax.lax.pmax(x, axes) if axes else x

    def piece(self, x, axis, dimension=0):
        """This device's piece of what all devices of a mesh axis have whole; the inverse of
        `gather`.
        """
        if self.size(axis) == 1:
            return x
        size = x.shape[dimension] // self.size(axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dimension)

    def expert_rank(self):
        """Where this device lies on the expert axis."""
        return jax.lax.axis_index("expert") if self.size("expert") > 1 else 0

    def gather_weight(self, name, w, dtype=None):
        """A weight, whole along what is split over fsdp; in `dtype` if it is given, from before it
        is sent.

        Its gradient is summed over the devices in the dtype of `w`.
        """
        dtype = dtype or w.dtype
        axes = [
            axis is not None and getattr(RULES, axis) == "fsdp"
            for axis in parameter_axes(name, w.ndim)
        ]
        if self.size("fsdp") == 1 or not any(axes):
            return w.astype(dtype)
        return checkpoint_name(_gather_cast(w, dtype, "fsdp", axes.index(True)), GATHERED_WEIGHT)

    def gather_experts(self, name, w, dtype):
        """A weight of the experts of all devices, whole along what is split over fsdp as well, in
        `dtype`.

        Its gradient is summed over the devices in the dtype of `w`.
        """
        if self.size("expert") == 1:
            return self.gather_weight(name, w, dtype)
        return checkpoint_name(
            _gather_cast(self.gather_weight(name, w), dtype, "expert", 0), GATHERED_WEIGHT
        )

    def without_whole_weights(self, function, of_all_experts=False):
        """`function` of arrays that gathers weights: they are gathered again in its backward pass,
        never kept whole.

        A `jax.checkpoint` within would keep what this one's policy says, not its own: what else is
        to be computed again within has a custom derivative. Layers are scanned, so the backward
        pass is a loop of its own, in which gathering twice is gathering once; hence no barriers.
        `of_all_experts`: `function` gathers those of the expert axis too.
        """
        gathers_experts = self.sends_rows or (of_all_experts and self.size("expert") > 1)
        if self.size("fsdp") == 1 and not gathers_experts:
            return function
        return jax.checkpoint(function, policy=_all_but_gathered_weights, prevent_cse=False)

    def score(self, function, x, w_down):
        """Scores of the tokens of this device by all experts.

        With `all_to_all`, the Wdown of all experts are gathered where they are smaller than the
        tokens of the expert axis. Elsewhere tokens are gathered, each device scores for its own
        experts, and the scores return.

        Args:
          function: `(x [T, d], w_down [m, d, r]) -> arrays [T or fewer, m]`, as a tuple.
          x: `[t, d]`. w_down: `[m, d, r]` of this device's experts, its piece of d_model.

        Returns:
          The arrays, `[t or fewer, n]`.
        """

        def of_all(x, w_down):
            if self.size("fsdp") > 1:
                w_down = self.gather_weight("w_down", w_down, x.dtype)
            if self.sends_rows and w_down.shape[0] * w_down.shape[2] <= x.shape[0]:
                return function(
                    x, checkpoint_name(_gather_cast(w_down, x.dtype, "expert", 0), GATHERED_WEIGHT)
                )
            of_own_experts = function(self.gather(x, "expert"), w_down)
            return tuple(self.exchange(a, split=0, concatenate=1) for a in of_own_experts)

        return self.without_whole_weights(of_all)(x, w_down)

    def matrix_norms(self, w):
        """The Frobenius norms of the Wdown of all experts: `w [m, d, r]` of this device's, its
        piece of d_model -> `[n]`.
        """
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return self.gather(safe_root(self.total(jnp.sum(w * w, axis=(1, 2)), ("fsdp",))), "expert")

    def check_sequences(self):
        """ValueError for flat tokens on a mesh, where no device knows which of them are of one
        sequence.
        """
        if len(self.shape) == 1 and self.total_size > 1:
            raise ValueError(
                f"on a mesh, tokens of sequences [B, S, d] are wanted, got {self.shape} and d"
            )

    def whole_sequences(self, values):
        """`[t, ...]` of this device as whole sequences `[B, S, ...]`, those of the devices along
        the tensor axis.
        """
        self.check_sequences()
        return self.gather(values.reshape(-1, self.shape[-1], *values.shape[1:]), "tensor", 1)

    def all_tokens(self, values):
        """`[t, ...]` of every device as `[all tokens, ...]`, in the order of the batch: `[B, S]`,
        flattened.
        """
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
        rank, n_ranks = jax.lax.axis_index("tensor"), self.size("tensor")
        if len(self.shape) == 1:
            first = (self._batch_rank() * n_ranks + rank) * self.shape[0]
            return jax.lax.dynamic_slice_in_dim(values, first, self.shape[0])
        b, s = self.shape
        values = self.own_sequences(
            values.reshape(b * self.batch_pieces, s * n_ranks, *values.shape[1:])
        )
        return jax.lax.dynamic_slice_in_dim(values, rank * s, s, axis=1).reshape(
            -1, *values.shape[2:]
        )

    def own_sequences(self, values):
        """A value for every sequence of the batch, `[B, ...]` -> those of this device, `[b, ...]`."""
        if self.batch_pieces == 1:
            return values
        b = values.shape[0] // self.batch_pieces
        return jax.lax.dynamic_slice_in_dim(values, self._batch_rank() * b, b)

    @property
    def batch_pieces(self):
        """How many devices sequences are split over."""
        return math.prod(self.sizes[:3])

    def _batch_rank(self):
        """Where this device lies among them."""
        data, fsdp, expert = (jax.lax.axis_index(axis) for axis in MESH_AXES[:3])
        return (data * self.size("fsdp") + fsdp) * self.size("expert") + expert

    @property
    def total_size(self):
        """All devices."""
        return math.prod(self.sizes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_cast(w, dtype, axis, dimension):
    return jax.lax.all_gather(w.astype(dtype), axis, axis=dimension, tiled=True)


_gather_cast.defvjp(
    lambda w, *how: (_gather_cast(w, *how), jnp.zeros((), w.dtype)),
    lambda dtype, axis, dimension, like, g: (
        jax.lax.psum_scatter(g.astype(like.dtype), axis, scatter_dimension=dimension, tiled=True),
    ),
)


def ragged_offsets(rank, n_devices, n_rows):
    """`(input offsets, output offsets)` `[E]` of `ragged_all_to_all` between buffers of equal size
    for each device.

    Row blocks lie by receiver before, by sender after: what device `rank` sends lands in the block
      `rank` of each receiver.
    """
    block = n_rows // n_devices
    return jnp.arange(n_devices, dtype=jnp.int32) * block, jnp.full(
        n_devices, rank * block, jnp.int32
    )


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
    """`function(devices, *args)` on every device of the mesh in context; without a mesh, on the
    arrays as they are.

    Args:
      function: gets this device's pieces of the arguments; results that aren't split must be the
        same everywhere.
      in_specs: a tree of `PartitionSpec` for each argument, see `token_spec` and `weight_specs`.
      out_specs: the same for the result.
      transport: `MeshConfig.transport`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return partial(function, Devices(transport=transport))
    if set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(
            f"a mesh of axes {MESH_AXES} is wanted, see aoe_jax.sharding.make_mesh; got {mesh.axis_names}"
        )
    devices = Devices(tuple(mesh.shape[axis] for axis in MESH_AXES), transport)
    idle = tuple(axis for axis in MESH_AXES if devices.size(axis) == 1)
    in_specs = jax.tree.map(
        partial(_name_idle_axes, idle), in_specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    # check_vma: Pallas kernels say nothing of how their results vary over the mesh.
    return jax.shard_map(
        partial(function, devices), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _name_idle_axes(idle, spec):
    """The same split, with axes of one device named in it: over axes that aren't, gradients would
    be summed.
    """
    named = {
        axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)
    }
    rest = tuple(axis for axis in idle if axis not in named)
    if not spec or not rest:
        return spec
    first = () if spec[0] is None else (spec[0],) if isinstance(spec[0], str) else spec[0]
    return PartitionSpec((*first, *rest), *spec[1:])


def _all_but_gathered_weights(primitive, *_, **params):
    """A checkpoint policy: weights are gathered again in the backward pass, never kept whole."""
    inner = params["call_jaxpr"].eqns if primitive.name == "custom_vjp_call" else ()
    gathers = any(eqn.primitive.name == "all_gather" for eqn in inner)
    return not gathers and params.get("name") != GATHERED_WEIGHT


def token_spec(ndim, *trailing):
    """Tokens `[B, S]`, split by sequence and by position, or `[T]`, split over both; then axes that
    are whole.
    """
    batch, sequence = RULES.spec("batch", "sequence")
    tokens = (batch, sequence) if ndim == 2 else ((*batch, sequence),)
    return PartitionSpec(*tokens, *trailing)


def weight_specs(weights):
    """How weights are split, by their names."""
    return {name: RULES.spec(*parameter_axes(name, w.ndim)) for name, w in weights.items()}


def sum_over_tokens(function, hidden, table, bias, targets, weights):
    """`function(hidden [N, d], table [V, d], targets [N], weights [N]) -> []`, summed over the
    tokens of all devices.

    `hidden [B, S, d]`, `targets` and `weights` `[B, S]`; `hidden` may be a tuple of several, and so
    may the result. A `bias [V]` of the output projection, if there is one, is given to the function
    as one more column of the table, with ones in `hidden`.
    """

    def local(devices, hidden, table, bias, targets, weights):
        sums = function(
            *_projection(devices, hidden, table, bias), targets.reshape(-1), weights.reshape(-1)
        )
        return jax.tree.map(lambda a: a[None], sums)

    table_spec = weight_specs({"embedding": table})["embedding"]
    in_specs = (token_spec(2, None), table_spec, PartitionSpec(), token_spec(2), token_spec(2))
    # Summed out here, for the derivative of `psum` in a `shard_map` is one more `psum`, of what all
    # devices have alike. Nothing but the layers' loop would order it, and XLA:CPU starts it beside
    # the collectives of that loop: a deadlock.
    of_devices = over_mesh(local, in_specs, PartitionSpec(MESH_AXES))(
        hidden, table, bias, targets, weights
    )
    return jax.tree.map(jnp.sum, of_devices)


def on_each_token(function, hidden, table, bias, *values):
    """`function(hidden [N, d], table [V, d], *values [N]) -> arrays [N]`, on the tokens of each
    device.

    `hidden [B, S, d]`, `values` `[B, S]`; `bias` as in `sum_over_tokens`. The arrays come as `[B,
    S]`, in a tuple.
    """

    def local(devices, hidden, table, bias, *values):
        arrays = function(
            *_projection(devices, hidden, table, bias), *(a.reshape(-1) for a in values)
        )
        return tuple(a.reshape(hidden.shape[:2]) for a in arrays)

    table_spec = weight_specs({"embedding": table})["embedding"]
    in_specs = (token_spec(2, None), table_spec, PartitionSpec(), *(token_spec(2) for _ in values))
    return over_mesh(local, in_specs, token_spec(2))(hidden, table, bias, *values)


def _projection(devices, hidden, table, bias):
    """`(hidden [N, d], table [V, d])` of a device, or `d + 1` with a bias; of several `hidden`, a
    tuple of them.
    """
    hidden = jax.tree.map(lambda h: h.reshape(-1, h.shape[-1]), hidden)
    table = devices.gather_weight("embedding", table)
    if bias is None:
        return hidden, table
    hidden = jax.tree.map(lambda h: jnp.concatenate([h, jnp.ones_like(h[:, :1])], axis=1), hidden)
    return hidden, jnp.concatenate([table, bias[:, None].astype(table.dtype)], axis=1)


def embed(table, tokens, dtype):
    """`table [V, d]`, `tokens [B, S]` -> `[B, S, d]` in `dtype`, split like the tokens of the
    layers.
    """

    def local(devices, table, tokens):
        return jnp.take(devices.gather_weight("embedding", table).astype(dtype), tokens, axis=0)

    in_specs = (weight_specs({"embedding": table})["embedding"], token_spec(2))
    return over_mesh(local, in_specs, token_spec(2, None))(table, tokens)
