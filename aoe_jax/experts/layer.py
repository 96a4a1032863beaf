"""Layers of experts as Linen modules: parameters, and the one pipeline score, select, dispatch, experts, combine.

Initialisation preserves variance, for every kind alike: matrices are drawn at `1 / sqrt(fan_in)`, so that for tokens of
unit mean square the gate pre-activations start at variance 1, be they `x Wg` or `(x Wdown) Wup`. Where the paper is silent:
with both factors drawn at one small std, the product would start the gate many times smaller than an unfactorised one.
The norms then start near `sqrt(r)` with a spread of `1 / sqrt(2)` over experts, close to the spread 1 of router logits.

t tokens of a device, d model width, n experts, R rows, r low rank (d_low), w expert width.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aoe_jax.config import BalanceConfig, ExpertsConfig
from aoe_jax.experts import capacity, dispatch, parallel, scoring, selection
from aoe_jax.experts import transport as transports
from aoe_jax.experts.balance import LayerStats, layer_stats
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, swiglu, weighted_product

matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)

# A selection method is one function from scores [t, n] to an Assignment; this is where it gets its settings, the token
# weights [t] and the devices where tokens compete with each other, and the selection bias [n] (or None) of loss-free
# balancing.
SELECTIONS = {
    "top_k": lambda c, devices, token_weights, bias: partial(
        selection.top_k, k=c.top_k, gate=c.gate, bias=bias, jitter=c.router_jitter
    ),
    "ranked": lambda c, devices, token_weights, bias: partial(selection.ranked, ranks=c.ranks, bias=bias),
    "top_p": lambda c, devices, token_weights, bias: partial(selection.top_p, threshold=c.top_p),
    "expert_choice": lambda c, devices, token_weights, bias: _expert_choice(c, devices, token_weights),
}


def _expert_choice(c, devices, token_weights):
    settings = {"capacity_factor": c.capacity_factor, "token_weights": token_weights}
    if devices.total_size == 1:
        return partial(selection.expert_choice, **settings)
    return partial(selection.expert_choice_among, **settings, all_tokens=devices.all_tokens, own=devices.own_tokens)


# The gates: (rows [R, d], round, groups, weights) -> (pre-activations [R, w], C [R, r] or None).
def whole_gate(rows, round, groups, w):
    """Of a traditional expert: `x Wg`."""
    return checkpoint_name(grouped_matmul(rows, w["w_g"], groups), EXPERT_RESIDUAL), None


def _low_rank_gate(rows, round, groups, w):
    c = checkpoint_name(grouped_matmul(rows, w["w_down"], groups), EXPERT_RESIDUAL)
    return grouped_matmul(c, w["w_up"], groups), c


def _norms_of_round(transport, n_slots, plan, number, args):
    """The norms of a round's rows, at their slots: what `sum_over_rounds` sums."""
    x, w_down = args
    round = transport.round(plan, number)
    c = grouped_matmul(transport.dispatch(x, round), w_down, transport.groups(round))
    return transport.slot_values(scoring.activation_norms(c), round, n_slots)


def _output_of_round(transport, gate, plan, number, args):
    """What a round's rows add to the tokens."""
    x, slot_weight, w = args
    with jax.named_scope("dispatch"):
        round = transport.round(plan, number)
        rows = transport.dispatch(x, round)
    with jax.named_scope("experts"):
        pre_activations, _ = gate(rows, round, transport.groups(round), w)
    return _rows_to_tokens(transport, round, rows, pre_activations, slot_weight, w, x.shape[0])


def _rows_to_tokens(transport, round, rows, pre_activations, slot_weight, w, n_tokens):
    with jax.named_scope("experts"):
        row_weight = transport.row_values(slot_weight, round)
        rows = swiglu(rows, pre_activations, row_weight, w["w_p"], w["w_o"], transport.groups(round))
    with jax.named_scope("combine"):
        return transport.combine(rows, round, n_tokens)


class _ExpertsModule(nn.Module):
    """What the layers share: tokens of any leading shape, float32 parameters cast to a dtype of computation, a pipeline."""

    config: ExpertsConfig
    dtype: Any = jnp.float32
    balance: BalanceConfig = BalanceConfig()
    recompute: bool = False  # model.remat="experts"
    transport: str = "ring"  # MeshConfig.transport

    @nn.compact
    def __call__(self, x, token_weights=None, selection_bias=None):
        """Applies the layer, on the mesh in context where there is one (`jax.set_mesh`).

        Args:
          x: tokens `[..., d]`; on a mesh `[B, S, d]` or `[T, d]`.
          token_weights: `[...]`, 1 for a token that counts in the statistics and balance losses, 0 for padding; None: all.
          selection_bias: `[n]` float32 of loss-free balancing, or None.

        Returns:
          `(y, stats)`: `[..., d]` in the dtype of computation, and `balance.LayerStats`. With sparse scoring the statistics
          have a gradient only where `balance` has a loss.
        """
        weights = {name: self.param(name, init, shape) for name, (init, shape) in self.weights(x.shape[-1]).items()}
        token_weights = jnp.ones(x.shape[:-1]) if token_weights is None else token_weights

        def process(devices, x, token_weights, selection_bias, weights):
            devices = dataclasses.replace(devices, shape=x.shape[:-1])
            flat = x.reshape(-1, x.shape[-1])
            y, stats = self.process(devices, flat, token_weights.reshape(-1), selection_bias, weights)
            return y.reshape(x.shape), stats

        tokens = min(x.ndim - 1, 2)
        in_specs = (
            parallel.token_spec(tokens, None),
            parallel.token_spec(tokens),
            PartitionSpec(),
            parallel.weight_specs(weights),
        )
        out_specs = (parallel.token_spec(tokens, None), PartitionSpec())
        run = parallel.over_mesh(process, in_specs, out_specs, self.transport)
        return run(x.astype(self.dtype), token_weights, selection_bias, weights)

    def pipeline(self, devices, x, token_weights, selection_bias, scores, balance_scores, gate, weights):
        """The stations after scoring; the kinds of expert differ in their gate.

        `x [t, d]`, `scores [t, n]`, `balance_scores` those of every stride-th token; `weights` are float32 parameters by
        name, pieces of those of this device's experts, `w_p` and `w_o` among them.
        """
        c = self.config
        scores, balance_scores = (checkpoint_name(s, selection.SELECTION) for s in (scores, balance_scores))
        with jax.named_scope("select"):
            assignment = SELECTIONS[c.selection](c, devices, token_weights, selection_bias)(scores)
        with jax.named_scope("balance"):
            stride = self.balance.aux_stride
            stats = layer_stats(scores, balance_scores, assignment, token_weights, stride, devices.total)
        with jax.named_scope("plan"):
            rows_per_token = c.capacity_factor if c.selection == "expert_choice" else c.top_k
            transport = transports.make_transport(
                devices, c.n_experts, rows_per_token, x.shape[0], assignment.slots_per_token
            )
            assignment = transport.gather_slots(assignment)
            plan = transport.plan(assignment)
            n_slots, n_rounds = assignment.expert.shape[0], transport.rounds(plan)

        def experts(x, slot_weight, weights):
            # Cast here, where it is computed again: a cast copy of all weights is not kept, nor are whole ones.
            with jax.named_scope("experts"):
                w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            with jax.named_scope("dispatch"):
                x = transport.gather(x)
                round = transport.round(plan, 0)
                rows = transport.dispatch(x, round)
            with jax.named_scope("experts"):
                pre_activations, c_rows = gate(rows, round, transport.groups(round), w)
                if c.sparse_scoring:
                    norms = transport.slot_values(scoring.activation_norms(c_rows), round, n_slots)
                    of_round = partial(_norms_of_round, transport, n_slots)
                    norms = transports.sum_over_rounds(of_round, norms, n_rounds, plan, (x, w["w_down"]))
                    slot_weight = selection.weigh_chosen(assignment, transport.complete(norms)).weight
            y = _rows_to_tokens(transport, round, rows, pre_activations, slot_weight, w, x.shape[0])
            of_round = partial(_output_of_round, transport, gate)
            y = transports.sum_over_rounds(of_round, y, n_rounds, plan, (x, slot_weight, w))
            with jax.named_scope("combine"):
                return transport.scatter(y)

        experts = self.economical(devices, experts)
        return experts(x, assignment.weight, weights), stats

    def economical(self, devices, experts):
        """The same function of arrays, which keeps for its backward pass what `model.remat` says."""
        if self.recompute:
            return jax.checkpoint(experts, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_RESIDUAL))
        return devices.without_whole_weights(experts)


class AoELayer(_ExpertsModule):
    """Autonomy-of-Experts layer (Algorithm 2): experts ranked by the norm of their own low-rank activations, no router."""

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        n, r, width = self.config.n_experts, self.config.d_low, self.config.width(d)
        shapes = {"w_down": (n, d, r), "w_up": (n, r, width), "w_p": (n, d, width), "w_o": (n, width, d)}
        return {name: (expert_init, shape) for name, shape in shapes.items()}

    def process(self, devices, x, token_weights, selection_bias, weights):
        """`x [t, d]`, `token_weights [t]` -> `([t, d], LayerStats)`."""
        stride, operands, gate = self.balance.aux_stride, (x, weights["w_down"]), _low_rank_gate
        with jax.named_scope("score"):
            if self.config.sparse_scoring:
                if not self.balance.has_loss:
                    operands = jax.lax.stop_gradient(operands)
                scores, balance_scores = devices.score(partial(scoring.sparse_scores, stride=stride), *operands)
            elif transports.is_local(devices, self.config.takes_k) and devices.size("tensor") == 1:

                def activations(x, w_down):
                    return scoring.low_rank_activations(x, devices.gather_weight("w_down", w_down, x.dtype))

                cache = devices.without_whole_weights(activations)(x, weights["w_down"])
                scores = scoring.activation_norms(cache)
                balance_scores = scores[::stride]

                def gate(rows, round, groups, w):
                    c = dispatch.take_activations(cache, *round)
                    return grouped_matmul(c, w["w_up"], groups), None

            else:  # the rows lie where the cache doesn't: their activations are computed again
                (scores,) = devices.score(lambda x, w_down: (scoring.norms(x, w_down),), *operands)
                balance_scores = scores[::stride]
        return self.pipeline(devices, x, token_weights, selection_bias, scores, balance_scores, gate, weights)


class RouterLayer(_ExpertsModule):
    """Traditional mixture-of-experts layer (Algorithm 1), with Table 2's ablations: factorised gate, large router."""

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        c, width = self.config, self.config.width(d)
        hidden = c.large_router_width(d)
        routers = {"w_router_hidden": (d, hidden), "w_router": (hidden, c.n_experts)}
        if not c.large_router:
            routers = {"w_router": (d, c.n_experts)}
        gates = {"w_g": (c.n_experts, d, width)}
        if c.factorised_gate:
            gates = {"w_down": (c.n_experts, d, c.d_low), "w_up": (c.n_experts, c.d_low, width)}
        experts = {"w_p": (c.n_experts, d, width), "w_o": (c.n_experts, width, d), **gates}
        return {name: (matrix_init, shape) for name, shape in routers.items()} | {
            name: (expert_init, shape) for name, shape in experts.items()
        }

    def process(self, devices, x, token_weights, selection_bias, weights):
        """`x [t, d]`, `token_weights [t]` -> `([t, d], LayerStats)`."""
        weights = dict(weights)
        w_router = weights.pop("w_router")
        with jax.named_scope("score"):
            if self.config.large_router:
                scores = scoring.large_router_logits(x, weights.pop("w_router_hidden"), w_router)
            else:
                scores = scoring.router_logits(x, w_router)
        gate = _low_rank_gate if self.config.factorised_gate else whole_gate
        balance_scores = scores[:: self.balance.aux_stride]
        return self.pipeline(devices, x, token_weights, selection_bias, scores, balance_scores, gate, weights)


class CapacityLayer(RouterLayer):
    """A router layer whose experts have room for a fixed number of tokens of each sequence, see `experts/capacity.py`.

    A group is the tokens along the axis before the last: sequences of `[B, S, d]`. Statistics and balance losses are of the
    router's choice, before anything is dropped, but for `dropped_share`; so is what loss-free balancing goes by.
    """

    def pipeline(self, devices, x, token_weights, selection_bias, scores, balance_scores, gate, weights):
        """The stations after scoring, arguments as in a router layer; the gate is whole.

        Raises:
          ValueError: tokens `[T, d]` on a mesh, of which each device would have a group of its own.
        """
        if len(devices.shape) == 1 and devices.total_size > 1:
            raise ValueError(f"on a mesh, tokens of sequences [B, S, d] are wanted, got {devices.shape} and d")
        c, length = self.config, devices.shape[-1]
        scores, balance_scores = (checkpoint_name(s, selection.SELECTION) for s in (scores, balance_scores))

        def whole(a):
            """`[t, ...]` of a device as whole groups `[G, T, ...]`."""
            return devices.gather(a.reshape(-1, length, *a.shape[1:]), "tensor", 1)

        with jax.named_scope("select"):
            assignment = SELECTIONS[c.selection](c, devices, token_weights, selection_bias)(scores)
            expert, weight = (a.reshape(-1, c.top_k) for a in (assignment.expert, assignment.weight))
            expert = whole(jnp.where(token_weights[:, None] > 0, expert, c.n_experts))  # padding takes no place
            n_places = capacity.places_of_expert(expert.shape[1], c.n_experts, c.top_k, c.capacity_factor)
            places = capacity.capacity_assignment(expert, whole(weight), c.n_experts, n_places)
        with jax.named_scope("balance"):
            stats = layer_stats(
                scores, balance_scores, assignment, token_weights, self.balance.aux_stride, devices.total
            )
            of_own = places.dropped.sum() / devices.size("tensor")  # whose devices all have the same groups
            dropped, n_tokens = devices.total((of_own, token_weights.sum()))
            stats = stats._replace(dropped_share=dropped / jnp.maximum(n_tokens, 1))

        def experts(x, places, weights):
            with jax.named_scope("experts"):
                w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            y = capacity.capacity_experts(whole(x), places, n_places, w, devices.exchange)
            return devices.sum_scatter(y, "tensor", 1).reshape(x.shape)

        return self.economical(devices, experts)(x, places, weights), stats


class DenseLayer(_ExpertsModule):
    """One SwiGLU of width `d_ffn` for every token: the baseline without experts. Its statistics are those of one expert."""

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        width = self.config.d_ffn
        shapes = {"w_g": (d, width), "w_p": (d, width), "w_o": (width, d)}
        return {name: (matrix_init, shape) for name, shape in shapes.items()}

    def process(self, devices, x, token_weights, selection_bias, weights):
        """`x [t, d]`, `token_weights [t]` -> `([t, d], LayerStats)`."""

        @jax.named_scope("experts")
        def expert(x, weights):
            w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            return weighted_product(x @ w["w_g"], x @ w["w_p"], jnp.ones(x.shape[0])) @ w["w_o"]

        y = devices.without_whole_weights(expert)(devices.gather(x, "tensor"), weights)
        one, zero = jnp.ones(1), jnp.zeros(())
        stats = LayerStats(load=one, mean_probability=one, confidence_entropy=zero, mean_score=one, score_spread=zero)
        return devices.sum_scatter(y, "tensor"), stats


LAYERS = {"aoe": AoELayer, "router": RouterLayer, "capacity": CapacityLayer, "dense": DenseLayer}
