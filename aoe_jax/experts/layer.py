"""Layers of experts as Linen modules: parameters, and the one pipeline score, select, dispatch, experts, combine.

Initialisation preserves variance, for every kind alike: matrices are drawn at `1 / sqrt(fan_in)`, so that for tokens of
unit mean square the gate pre-activations start at variance 1, be they `x Wg` or `(x Wdown) Wup`. Where the paper is silent:
with both factors drawn at one small std, the product would start the gate many times smaller than an unfactorised one.
The norms then start near `sqrt(r)` with a spread of `1 / sqrt(2)` over experts, close to the spread 1 of router logits.

t tokens of a device, d model width, n experts, R rows, r low rank (d_low), w expert width.
"""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aoe_jax.config import BalanceConfig, Config, ExpertsConfig
from aoe_jax.experts import capacity, coupling, dispatch, parallel, scoring
from aoe_jax.experts import transport as transports
from aoe_jax.experts.balance import LayerStats, layer_stats, sequence_balance_loss, z_loss
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.experts.selection.assignment import SELECTION, weigh_chosen
from aoe_jax.experts.selection.base import Given
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, swiglu, weighted_product

matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)


# The gates: (rows [R, d], round, groups, weights) -> (pre-activations [R, w], C [R, r] or None).
def whole_gate(rows, round, groups, w):
    """Of a traditional expert: `x Wg`."""
    return checkpoint_name(grouped_matmul(rows, w["w_g"], groups), EXPERT_RESIDUAL), None


def low_rank_gate(rows, round, groups, w):
    """Of an AoE expert: `(x Wdown) Wup`."""
    c = checkpoint_name(grouped_matmul(rows, w["w_down"], groups), EXPERT_RESIDUAL)
    return grouped_matmul(c, w["w_up"], groups), c


def expert_shapes(config: ExpertsConfig, d):
    """The matrices of all experts of a layer: name -> shape."""
    n, r, width = config.n_experts, config.d_low, config.width(d)
    gates = {"w_down": (n, d, r), "w_up": (n, r, width)} if config.low_rank else {"w_g": (n, d, width)}
    return gates | {"w_p": (n, d, width), "w_o": (n, width, d)}


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


class ExpertsModule(nn.Module):
    """What the layers share: tokens of any leading shape, float32 parameters cast to a dtype of computation, a pipeline."""

    selects: ClassVar[bool] = True  # whether experts are chosen, by the method `config.selection`
    not_by_token: ClassVar[str] = ""  # why it can't process a text token by token, the end of "for ..."; "": it can
    needs_key: ClassVar[bool] = False  # whether it draws at random in training, beside what the method draws
    needs_place: ClassVar[bool] = False  # whether it goes by the number of its layer and by positions
    gathers_experts: ClassVar[bool] = False  # whether each device computes with the experts of all
    # Forward passes of a training step. With 2, both have losses and gradients, and what they differ in is a loss as well,
    # of the weight `consistency_weight` in the settings.
    passes: ClassVar[int] = 1
    score_name: ClassVar[str] = "mean_logit"  # what `LayerStats.mean_score` is
    for_all_tokens: ClassVar[
        tuple
    ] = ()  # names of weights that every token uses; the others are those of single experts

    config: ExpertsConfig
    dtype: Any = jnp.float32
    balance: BalanceConfig = BalanceConfig()
    recompute: bool = False  # model.remat="experts"
    transport: str = "ring"  # MeshConfig.transport
    settings: Any = None  # the configuration group of the kind or of the selection method, where one has any
    training: bool = False

    @classmethod
    def experts_per_token(cls, config: ExpertsConfig):
        """Mean number of experts that process a token, or None where the scores decide it."""
        return SELECTIONS[config.selection].experts_per_token(config) if cls.selects else 1

    @classmethod
    def flops_beside_experts(cls, config: Config, shared):
        """Useful FLOPs per token of a forward pass, but for those of its experts; `shared` weights are `for_all_tokens`."""
        return 2 * shared

    @staticmethod
    def not_causal_because(experts: ExpertsConfig) -> str:
        """Why a token depends on later ones, or on other sequences, whatever the selection; empty: it doesn't."""
        return ""

    @property
    def method(self):
        """The selection method."""
        return SELECTIONS[self.config.selection]

    @nn.compact
    def __call__(self, x, token_weights=None, routing_state=None, attention=None, number=0, positions=None):
        """Applies the layer, on the mesh in context where there is one (`jax.set_mesh`).

        Args:
          x: tokens `[..., d]`; on a mesh `[B, S, d]` or `[T, d]`.
          token_weights: `[...]`, 1 for a token that counts in the statistics and balance losses, 0 for padding; None: all.
          routing_state: of this layer, what its selection method has beside parameters, see `Selection.initial_state`;
            None: that before training.
          attention: `[..., H]`, `selection.base.Given.attention`, which some methods need.
          number: of the layer in its model, for kinds with `needs_place`.
          positions: `[...]` int32, of tokens in their sequences, likewise; None: counted along the last axis but d.

        Returns:
          `(y, stats)`: `[..., d]` in the dtype of computation, and `balance.LayerStats`. With sparse scoring the statistics
          have a gradient only where `balance` has a loss.

        Raises:
          ValueError: the method needs `attention`, and there is none.
        """
        if self.selects and self.method.needs_attention and attention is None:
            raise ValueError(f"selection {self.config.selection!r} goes by the attention before the experts; give it")
        weights = {name: self.param(name, init, shape) for name, (init, shape) in self.weights(x.shape[-1]).items()}
        of_method = self.method.parameters(self.config, self.settings) if self.selects else {}
        of_method = {name: self.param(name, init, shape) for name, (init, shape) in of_method.items()}
        draws = self.training and (self.needs_key or (self.selects and self.method.needs_key))
        key = self.make_rng("experts") if draws and not self.is_initializing() else None
        token_weights = jnp.ones(x.shape[:-1]) if token_weights is None else token_weights
        if not self.needs_place:
            number = positions = None
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])

        def process(devices, x, of_tokens, attention, of_layer, weights):
            devices = dataclasses.replace(devices, shape=x.shape[:-1])
            flat = x.reshape(-1, x.shape[-1])
            token_weights, positions = jax.tree.map(lambda a: a.reshape(-1), of_tokens)
            state, parameters, key, number = of_layer
            if attention is not None:
                attention = attention.reshape(-1, attention.shape[-1])
            given = Given(
                *(devices, token_weights, self.settings, state, parameters, flat, key, self.training),
                attention=attention,
                number=number,
                positions=positions,
            )
            y, stats, per_token = self.process(devices, flat, given, weights)
            return y.reshape(x.shape), stats, jax.tree.map(lambda a: a.reshape(x.shape[:-1]), per_token)

        tokens = min(x.ndim - 1, 2)
        in_specs = (
            parallel.token_spec(tokens, None),
            parallel.token_spec(tokens),
            parallel.token_spec(tokens, None),
            PartitionSpec(),
            parallel.weight_specs(weights),
        )
        out_specs = (parallel.token_spec(tokens, None), PartitionSpec(), parallel.token_spec(tokens))
        run = parallel.over_mesh(process, in_specs, out_specs, self.transport)
        if not routing_state and self.selects:
            routing_state = self.method.initial_state(self.config, self.balance, self.settings, x.shape[-1])
        of_layer = (routing_state or {}, of_method, key, number)
        of_tokens = token_weights, positions
        y, stats, per_token = run(x.astype(self.dtype), of_tokens, attention, of_layer, weights)
        return y, stats._replace(per_token=per_token) if per_token else stats

    def select(self, given, scores, balance_scores):
        """The select and balance stations: `(Assignment, LayerStats, per-token values)`; arguments as in `pipeline`."""
        with jax.named_scope("select"):
            choice = self.method.choose(self.config, scores, given)
        with jax.named_scope("balance"):
            stride, total = self.balance.aux_stride, given.devices.total
            stats = layer_stats(scores, balance_scores, choice.assignment, given.token_weights, stride, total)
            if self.balance.z_weight:
                stats = stats._replace(z_loss=z_loss(balance_scores, given.token_weights[::stride], total))
            if self.training and self.balance.aux_batch == "sequence":
                loss = self._sequence_loss(given, balance_scores, choice.assignment)
                stats = stats._replace(sequence_loss=loss)
        return choice.assignment, stats._replace(records=choice.records, live=choice.live), choice.per_token

    def _sequence_loss(self, given, balance_scores, assignment):
        devices = given.devices
        if len(devices.shape) == 1 and devices.total_size > 1:
            raise ValueError(f"on a mesh, tokens of sequences [B, S, d] are wanted, got {devices.shape} and d")
        return sequence_balance_loss(
            balance_scores,
            assignment,
            given.token_weights,
            math.prod(devices.shape[:-1]),
            self.balance.aux_stride,
            within=partial(devices.total, axes=("tensor",)),
            total=devices.total,
        )

    def pipeline(self, devices, x, given, scores, balance_scores, gate, weights):
        """The stations after scoring; arguments as in `process_chosen`.

        `scores [t, n]`, `balance_scores` those of every stride-th token.
        """
        scores, balance_scores = (checkpoint_name(s, SELECTION) for s in (scores, balance_scores))
        assignment, stats, per_token = self.select(given, scores, balance_scores)
        return self.process_chosen(devices, x, assignment, gate, weights), stats, per_token

    def process_chosen(self, devices, x, assignment, gate, weights):
        """The stations after selection; the kinds of expert differ in their gate.

        `x [t, d]`; `weights` are float32 parameters by name, pieces of those of this device's experts, `w_p` and `w_o`
        among them.
        """
        c = self.config
        with jax.named_scope("plan"):
            rows_per_token = self.experts_per_token(c) or c.top_k
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
                    slot_weight = weigh_chosen(assignment, transport.complete(norms)).weight
            y = _rows_to_tokens(transport, round, rows, pre_activations, slot_weight, w, x.shape[0])
            of_round = partial(_output_of_round, transport, gate)
            y = transports.sum_over_rounds(of_round, y, n_rounds, plan, (x, slot_weight, w))
            with jax.named_scope("combine"):
                return transport.scatter(y)

        return self.economical(devices, experts)(x, assignment.weight, weights)

    def economical(self, devices, experts):
        """The same function of arrays, which keeps for its backward pass what `model.remat` says."""
        if self.recompute:
            return jax.checkpoint(experts, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_RESIDUAL))
        return devices.without_whole_weights(experts, self.gathers_experts)


class AoELayer(ExpertsModule):
    """Autonomy-of-Experts layer (Algorithm 2): experts ranked by the norm of their own low-rank activations, no router."""

    score_name = "mean_norm"

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        return {name: (expert_init, shape) for name, shape in expert_shapes(self.config, d).items()}

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""
        stride, operands, gate = self.balance.aux_stride, (x, weights["w_down"]), low_rank_gate
        with jax.named_scope("score"):
            if self.config.sparse_scoring:
                if not self.balance.has_loss:
                    operands = jax.lax.stop_gradient(operands)
                scores, balance_scores = devices.score(partial(scoring.sparse_scores, stride=stride), *operands)
            elif transports.is_local(devices, self.method.all_slots_used) and devices.size("tensor") == 1:

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
            if self.method.relative_scores:
                scores = scoring.relative_norms(scores, x, devices.matrix_norms(weights["w_down"]))
                balance_scores = scores[::stride]
        return self.pipeline(devices, x, given, scores, balance_scores, gate, weights)


class RouterLayer(ExpertsModule):
    """Traditional mixture-of-experts layer (Algorithm 1), with Table 2's ablations: factorised gate, large router.

    In training it may have the loss of `experts/coupling.py`, which is one of parameters and is computed here: so its
    gradient joins that of the layer before devices add it up, and needs no array of its own.
    """

    for_all_tokens = ("w_router", "w_router_hidden")

    @property
    def needs_key(self):
        """Whether it draws at random in training."""
        return self.balance.coupling_weight > 0

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

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""
        weights = dict(weights)
        w_router = weights.pop("w_router")
        with jax.named_scope("score"):
            if self.config.large_router:
                scores = scoring.large_router_logits(x, weights.pop("w_router_hidden"), w_router)
            elif self.method.relative_scores:
                scores = scoring.router_cosines(x, w_router)
            else:
                scores = scoring.router_logits(x, w_router)
        gate = low_rank_gate if self.config.factorised_gate else whole_gate
        balance_scores = scores[:: self.balance.aux_stride]
        y, stats, per_token = self.pipeline(devices, x, given, scores, balance_scores, gate, weights)
        if self.needs_key and given.key is not None:
            key = jax.random.fold_in(given.key, 0)  # the selection may draw from the key itself
            with jax.named_scope("balance"):
                loss = coupling.coupling_loss(devices, w_router, weights["w_g"], self.balance.coupling_alpha, key)
            stats = stats._replace(coupling=loss)
        return y, stats, per_token


class CapacityLayer(RouterLayer):
    """A router layer whose experts have room for a fixed number of tokens of each sequence, see `experts/capacity.py`.

    A group is the tokens along the axis before the last: sequences of `[B, S, d]`. Statistics and balance losses are of the
    router's choice, before anything is dropped, but for `dropped_share`; so is what loss-free balancing goes by.
    """

    not_by_token = "whether an expert has room for a token depends on other tokens of the text and on its length"

    @staticmethod
    def not_causal_because(experts):
        """As in every layer."""
        if experts.top_k == 1:
            return ""
        return (
            f"with experts.top_k={experts.top_k} the first choices of later tokens take the places of earlier tokens' other "
            "choices, and what is dropped says something of the future"
        )

    def pipeline(self, devices, x, given, scores, balance_scores, gate, weights):
        """The stations after scoring, arguments as in a router layer; the gate is whole.

        Raises:
          ValueError: tokens `[T, d]` on a mesh, of which each device would have a group of its own.
        """
        if len(devices.shape) == 1 and devices.total_size > 1:
            raise ValueError(f"on a mesh, tokens of sequences [B, S, d] are wanted, got {devices.shape} and d")
        c, length = self.config, devices.shape[-1]
        scores, balance_scores = (checkpoint_name(s, SELECTION) for s in (scores, balance_scores))

        def whole(a):
            """`[t, ...]` of a device as whole groups `[G, T, ...]`."""
            return devices.gather(a.reshape(-1, length, *a.shape[1:]), "tensor", 1)

        assignment, stats, per_token = self.select(given, scores, balance_scores)
        with jax.named_scope("select"):
            expert, weight = (a.reshape(-1, c.top_k) for a in (assignment.expert, assignment.weight))
            expert = whole(jnp.where(given.token_weights[:, None] > 0, expert, c.n_experts))  # padding takes no place
            n_places = capacity.places_of_expert(expert.shape[1], c.n_experts, c.top_k, c.capacity_factor)
            places = capacity.capacity_assignment(expert, whole(weight), c.n_experts, n_places)
        with jax.named_scope("balance"):
            of_own = places.dropped.sum() / devices.size("tensor")  # whose devices all have the same groups
            dropped, n_tokens = devices.total((of_own, given.token_weights.sum()))
            stats = stats._replace(dropped_share=dropped / jnp.maximum(n_tokens, 1))

        def experts(x, places, weights):
            with jax.named_scope("experts"):
                w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            y = capacity.capacity_experts(whole(x), places, n_places, w, devices.exchange)
            return devices.sum_scatter(y, "tensor", 1).reshape(x.shape)

        return self.economical(devices, experts)(x, places, weights), stats, per_token


class DenseLayer(ExpertsModule):
    """One SwiGLU of width `d_ffn` for every token: the baseline without experts. Its statistics are those of one expert."""

    selects = False

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        width = self.config.d_ffn
        shapes = {"w_g": (d, width), "w_p": (d, width), "w_o": (width, d)}
        return {name: (matrix_init, shape) for name, shape in shapes.items()}

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""

        @jax.named_scope("experts")
        def expert(x, weights):
            w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            return weighted_product(x @ w["w_g"], x @ w["w_p"], jnp.ones(x.shape[0])) @ w["w_o"]

        y = devices.without_whole_weights(expert)(devices.gather(x, "tensor"), weights)
        one, zero = jnp.ones(1), jnp.zeros(())
        stats = LayerStats(load=one, mean_probability=one, confidence_entropy=zero, mean_score=one, score_spread=zero)
        return devices.sum_scatter(y, "tensor"), stats, None
