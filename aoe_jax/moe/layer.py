"""The layer of experts: `moe_block` computes it, and `ExpertsLayer` declares its parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.moe import collectives, load_balance
from aoe_jax.moe.dispatch import Local, take_code
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.moe.routing import Context, Method, TopK
from aoe_jax.moe.scoring import SCORE_OF_CODE, Scores, aoe_scores, router_scores, score_columns
from aoe_jax.moe.swiglu import (
    KEPT_EXPERTS,
    first_neurons,
    gate_pre_activations,
    single_expert,
    swiglu,
)
from aoe_jax.parameters import LARGE_ROUTER, ROUTER, SHARED_EXPERT, matrices_of, shared_expert
from aoe_jax.sharding import AXES, MeshAxes, spec_of


def moe_block(x, weights, layer, ctx):
    """Computes a layer on one device, or inside `jax.shard_map` on each device of a mesh.

    `x [T, d]` in the dtype of computation -> `(y [T, d], LayerStats)`. `weights` are float32
    parameters by name, on a mesh this device's shards; `layer` is a `Layer`, `ctx` a `Context`.
    """
    with jax.named_scope("score"):
        if layer.experts.kind == "aoe":
            weights = weights | {"w_score": score_columns(weights, layer.experts, ctx.devices)}
        scores = layer.score(x, weights, ctx)
    with jax.named_scope("route"):
        routing = layer.router(scores.values, weights, ctx)
    with jax.named_scope("balance"):
        stats = layer.statistics(scores, routing, weights, ctx)
    y = apply_experts(x, routing, weights, layer, ctx, scores.code)
    if layer.experts.d_shared:
        y += apply_shared_expert(x, weights, layer, ctx.devices)
    if routing.added is not None:
        y += routing.added.astype(y.dtype)
    return y, stats


def parameters_of(experts, routing):
    """The `Parameter`s of a layer by name, in the order in which they are initialised."""
    matrices, own = matrices_of(experts), routing.parameters(experts) | shared_expert(experts)
    if experts.kind == "aoe":
        return matrices | own
    if experts.kind != "router":
        return own
    router = LARGE_ROUTER if experts.large_router else ROUTER
    # In a router MoE the gates are initialised after `w_up` and `w_down`.
    return router | {name: matrices[name] for name in ("w_up", "w_down")} | matrices | own


@dataclass(frozen=True)
class Layer:
    """The settings of a layer, and the steps of `moe_block` that depend on them."""

    experts: ExpertsConfig
    router: Method  # `config.routing`
    balance: BalanceConfig
    dtype: Any  # dtype of computation
    observe: Callable | None = None  # see `ExpertsLayer.observe`

    @cached_property
    def parameters(self):
        return parameters_of(self.experts, self.router)

    @property
    def sparse_scoring(self):
        return self.experts.sparse_scoring(self.router)

    def score(self, x, weights, ctx):
        if own := self.router.hooks.scores:
            return Scores.of(own(self.router, x, weights, ctx), self.balance.aux_stride)
        if self.experts.kind != "aoe":
            return router_scores(x, weights, self.balance.aux_stride)
        local = is_local(ctx.devices, self.router.choice(self.experts).is_fixed)
        keeps_code = local and ctx.devices.size("tensor") == 1 and self.experts.low_rank
        return aoe_scores(x, weights["w_score"], self, ctx.devices, keeps_code)

    def statistics(self, scores, routing, weights, ctx):
        logits = self.router.hooks.balance_logits(scores.for_balance)
        stats = load_balance.statistics(
            scores._replace(for_balance=logits), routing, self.balance, ctx
        )
        if self.observe is None:
            return stats
        observed = self.observe(scores.values, routing, weights, ctx)
        return stats._replace(records={"observed": observed})

    @jax.named_scope("row_scores")
    def row_scores(self, gate, code, devices):
        """AoE's score of each row: `gate [R, f]`, `code [R, r]` or None -> `(gate, scores [R])`."""
        score = SCORE_OF_CODE[self.experts.score]
        if code is not None:
            return gate, score(code)
        gate, code = first_neurons(gate, self.experts.score_neurons)
        return gate, devices.from_first(score(code))

    def gathered(self, weights, devices):
        """Gathers `weights` over fsdp, in the dtype of computation."""
        sums = None if self.experts.gradient_sums == "float32" else self.experts.gradient_sums
        return {
            name: devices.gather_weight(self.parameters[name], w, self.dtype, sums)
            for name, w in weights.items()
        }


@jax.named_scope("experts")
def apply_shared_expert(x, weights, layer, devices):
    """The expert that every token uses: `[T, d]` -> `[T, d]`. With `experts.shared_gate` its output
    is multiplied by `sigmoid(x w_shared_scale)` (Qwen2-MoE).
    """

    def expert(x, weights):
        w = layer.gathered(weights, devices)
        return single_expert(x, {name.replace("shared_", ""): w[name] for name in SHARED_EXPERT})

    matrices = {name: weights[name] for name in SHARED_EXPERT}
    y = rematerialised(expert, devices)(devices.gather(x, "tensor"), matrices)
    y = devices.sum_scatter(y, "tensor")
    if not layer.experts.shared_gate:
        return y
    scale = x.astype(jnp.promote_types(x.dtype, jnp.float32)) @ weights["w_shared_scale"]
    return (jax.nn.sigmoid(scale) * y).astype(x.dtype)


def is_local(devices, fixed_k):
    """Whether `Local` works: the device has all experts and, on a mesh, each token has K slots."""
    return devices.total_size == 1 or (devices.size("expert") == 1 and fixed_k)


def make_transport(devices, routing, experts, method, x):
    """The transport of a layer for the `Routing` of this device's tokens `x [T, d]`."""
    choice = method.choice(experts)
    per_token = (choice.per_token or experts.top_k) if choice else 1
    arguments = devices, experts.n_experts, routing.slots_per_token
    if is_local(devices, routing.slots_per_token == per_token):
        all_used, backend = bool(choice and choice.is_fixed), experts.grouped_matmul
        return Local(*arguments, all_used=all_used, backend=backend, dtype=x.dtype)
    if routing.slots_per_token is None:
        raise ValueError("on a mesh a router needs slots in the order of tokens; use by_mask")
    from aoe_jax.moe.transports import TRANSPORTS  # needed on meshes only

    share = x.shape[0] * devices.size("tensor") * per_token
    return TRANSPORTS[devices.transport](*arguments, share)


def apply_experts(x, routing, weights, layer, ctx, code=None):
    """Computes each token's sum of weighted expert outputs, `[T, d]`.

    `weights` include the experts' matrices. `code` is `Scores.code`.
    """
    devices, declared = ctx.devices, layer.parameters
    with jax.named_scope("schedule"):
        transport = make_transport(devices, routing, layer.experts, layer.router, x)
        routing = transport.gather_routing(routing)
        schedule = transport.schedule(routing)
    backend = layer.experts.grouped_matmul

    def rows_through_experts(x, slot_weight, weights, code):
        # Weights are gathered inside the rematerialised function, so that the backward pass gathers
        # them again and no whole weight is kept.
        with jax.named_scope("experts"):
            w = layer.gathered(weights, devices)
        with jax.named_scope("dispatch"):
            x = transport.gather(x)
            first = transport.round(schedule, 0)
            rows, groups = transport.dispatch(x, first)
        with jax.named_scope("experts"):
            row_code = None if code is None else take_code(code, first)
            gate, row_code, rows = gate_pre_activations(rows, groups, w, row_code, backend)
            if layer.sparse_scoring:
                # The scores that chose the experts have no gradient; the scores below have one.
                gate, scores = layer.row_scores(gate, row_code, devices)
                n_slots, score = routing.expert.shape[0], layer.experts.score
                scores = transport.slot_values(scores, first, n_slots)
                further = partial(scores_of_round, transport, backend, score, n_slots)
                w_score = score_columns(w, layer.experts, devices)
                scores = transport.further_rounds(scores, further, schedule, (x, w_score))
                scores = transport.complete(scores).reshape(-1, routing.slots_per_token)
                slot_weight = jax.nn.softmax(scores).reshape(-1)
            row_weight = transport.row_values(slot_weight, first)
            keeps_up = devices.remat in ("none", "experts")
            y = swiglu(rows, gate, row_weight, groups, w, backend, keeps_up)
        with jax.named_scope("combine"):
            y = transport.combine(y, first, x.shape[0])
        further = partial(outputs_of_round, transport, backend)
        y = transport.further_rounds(y, further, schedule, (x, slot_weight, w))
        with jax.named_scope("combine"):
            return transport.scatter(y)

    matrices = {
        name: w for name, w in weights.items() if name in declared and declared[name].per_expert
    }
    return rematerialised(rows_through_experts, devices)(x, routing.weight, matrices, code)


def scores_of_round(transport, backend, score, n_slots, schedule, number, args):
    """AoE's scores `[P]` of a later round, 0 for other slots; `args` is `(x, w_score)`."""
    x, w_score = args
    round = transport.round(schedule, number)
    rows, groups = transport.dispatch(x, round)
    scores = SCORE_OF_CODE[score](grouped_matmul(rows, w_score, groups, backend=backend))
    return transport.slot_values(scores, round, n_slots)


def outputs_of_round(transport, backend, schedule, number, args):
    """The outputs `[T, d]` of a later round; `args` is `(x, slot weights [P], matrices)`."""
    x, slot_weight, w = args
    round = transport.round(schedule, number)
    rows, groups = transport.dispatch(x, round)
    gate, _, rows = gate_pre_activations(rows, groups, w, backend=backend)
    row_weight = transport.row_values(slot_weight, round)
    y = swiglu(rows, gate, row_weight, groups, w, backend, keeps_up=False)
    return transport.combine(y, round, x.shape[0])


def rematerialised(function, devices, gathers_experts=False):
    """Wraps a function of arrays so that its backward pass recomputes what `model.remat` says."""
    if devices.remat == "experts":
        policy = jax.checkpoint_policies.save_only_these_names(KEPT_EXPERTS)
        return jax.checkpoint(function, policy=policy)
    return devices.without_whole_weights(function, gathers_experts)


class ExpertsLayer(nn.Module):
    """A layer of experts of any kind: AoE, router, or a method of `aoe_jax/methods/`.

    Tokens may have any leading shape. Parameters are float32; computation is in `dtype`.
    """

    experts: ExpertsConfig = ExpertsConfig()
    routing: Method = TopK()  # for kind "aoe" or "router" the router, else the layer
    balance: BalanceConfig = BalanceConfig()
    dtype: Any = jnp.float32
    # `model.remat`; for "layer" and "full" the caller wraps the layer in `jax.checkpoint`.
    remat: str = "none"
    transport: str = "ring"  # `mesh.transport`
    training: bool = False  # whether methods may use random numbers and record losses
    # `(scores [T, n], routing, weights, ctx) -> arrays`; `stats.records["observed"]` stores them.
    observe: Callable | None = None
    # Names of the axes of the mesh; None: `sharding.MESH_AXES`. With names, split parameters are
    # `nn.Partitioned`, which `nn.get_partition_spec` needs.
    axes: MeshAxes | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        token_weights: jax.Array | None = None,
        routing_state: dict[str, jax.Array] | None = None,
        captured: jax.Array | None = None,
        layer_index: jax.Array | int = 0,
        positions: jax.Array | None = None,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerStats]:
        """Applies the layer, on the mesh in context if there is one (`jax.set_mesh`).

        Args:
          x: tokens `[..., d]`; on a mesh `[B, S, d]` or `[T, d]`.
          token_weights: `[...]`, 1 for a token that counts in statistics and balance losses, 0 for
            padding; None: all count.
          routing_state: `Method.state` of this layer; None: the state before training.
          captured: `[..., H]`, the result of the method's `Hooks.attention`.
          layer_index: the number of the layer in its model.
          positions: `[...]` int32, position in the sequence; None: 0, 1, ... on the axis before d.
          token_ids: `[...]` int32, for methods that route by token.

        Returns:
          `(y [..., d], LayerStats)`, y in the dtype of computation. With
          `experts.sparse_scoring` the statistics have a gradient only if `balance` has a loss.
        """
        method, d = self.routing, x.shape[-1]
        function = moe_block if self.experts.kind in ("aoe", "router") else method
        if function is method and method.name != self.experts.kind:
            raise ValueError(
                f"kind={self.experts.kind!r}: give the layer of aoe_jax.methods with this name as "
                "`routing`, or kind='aoe' or 'router'"
            )
        layer = Layer(self.experts, method, self.balance, self.dtype, self.observe)
        sizes = self.experts.sizes(d)
        weights = {
            name: self.param(name, self._initialiser(parameter), parameter.shape(sizes))
            for name, parameter in layer.parameters.items()
        }
        training = self.training and not self.is_initializing()
        rng = self.make_rng("experts") if training and self.has_rng("experts") else None
        if token_weights is None:
            token_weights = jnp.ones(x.shape[:-1])
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])
        routing_state = routing_state or method.state(self.experts, self.balance, d)

        def block(devices, x, token_weights, positions, token_ids, captured, of_layer, weights):
            devices = replace(devices, shape=x.shape[:-1])
            flat = lambda a, n_axes=0: a.reshape(-1, *a.shape[a.ndim - n_axes :])  # noqa: E731
            state, rng, layer_index = of_layer
            ctx = Context(
                devices=devices,
                x=flat(x, 1),
                token_weights=flat(token_weights),
                top_k=self.experts.top_k,
                training=training,
                state=state,
                rng=rng,
                captured=None if captured is None else flat(captured, 1),
                positions=flat(positions),
                layer_index=layer_index,
                token_ids=None if token_ids is None else flat(token_ids),
            )
            y, stats = function(ctx.x, weights, layer, ctx)
            per_token = jax.tree.map(lambda a: a.reshape(x.shape[:-1]), stats.per_token)
            return y.reshape(x.shape), stats._replace(per_token=None), per_token

        n_axes = min(x.ndim - 1, 2)
        tokens, vectors = (collectives.token_spec(n_axes, *last) for last in ((), (None,)))
        weight_specs = collectives.weight_specs(layer.parameters, weights)
        in_specs = (vectors, tokens, tokens, tokens, vectors, PartitionSpec(), weight_specs)
        out_specs = (vectors, PartitionSpec(), tokens)
        how = self.transport, self.remat, self.axes or AXES
        run = collectives.over_mesh(block, in_specs, out_specs, *how)
        of_layer = (routing_state, rng, layer_index)
        y, stats, per_token = run(
            x.astype(self.dtype), token_weights, positions, token_ids, captured, of_layer, weights
        )
        return y, stats._replace(per_token=per_token)

    def _initialiser(self, parameter):
        spec = self.axes.spec(spec_of(*parameter.split)) if self.axes else ()
        if not any(spec):
            return parameter.init

        def init(*args):
            w, mesh = parameter.init(*args), jax.sharding.get_abstract_mesh()
            return jax.sharding.reshard(w, spec) if mesh.explicit_axes else w

        return nn.with_partitioning(init, tuple(spec))


def config_of_kind(kind, experts):
    """`experts`; None: the defaults of `kind`. Raises ValueError if `experts` has another kind."""
    experts = ExpertsConfig(kind=kind) if experts is None else experts
    if experts.kind != kind:
        raise ValueError(f"ExpertsConfig(kind={experts.kind!r}): this layer needs kind={kind!r}")
    return experts


def AoELayer(experts: ExpertsConfig | None = None, **settings: Any) -> ExpertsLayer:
    """An `ExpertsLayer` of AoE (Algorithm 2); `aoe_jax.AoE` is the same with plain arguments."""
    return ExpertsLayer(config_of_kind("aoe", experts), **settings)


def RouterLayer(experts: ExpertsConfig | None = None, **settings: Any) -> ExpertsLayer:
    """An `ExpertsLayer` of the traditional mixture of experts (Algorithm 1)."""
    return ExpertsLayer(config_of_kind("router", experts), **settings)
