"""Layers of experts as Linen modules: parameters, and the one pipeline score, select, dispatch,
experts, combine.

Initialisation preserves variance, for every kind alike: matrices are drawn at `1 / sqrt(fan_in)`,
so that for tokens of unit mean square the gate pre-activations start at variance 1, be they `x Wg`
or `(x Wdown) Wup`. Where the paper is silent: with both factors drawn at one small std, the product
would start the gate many times smaller than an unfactorised one. The norms then start near
`sqrt(r)` with a spread of `1 / sqrt(2)` over experts, close to the spread 1 of router logits.

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
from aoe_jax.experts import parallel, scoring
from aoe_jax.experts import transport as transports
from aoe_jax.experts.balance import layer_stats, sequence_balance_loss, z_loss
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.experts.selection.assignment import SELECTION, weigh_chosen
from aoe_jax.experts.selection.base import Given
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, swiglu

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
    gates = (
        {"w_down": (n, d, r), "w_up": (n, r, width)} if config.low_rank else {"w_g": (n, d, width)}
    )
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
        rows = swiglu(
            rows, pre_activations, row_weight, w["w_p"], w["w_o"], transport.groups(round)
        )
    with jax.named_scope("combine"):
        return transport.combine(rows, round, n_tokens)


class ExpertsModule(nn.Module):
    """What the layers share: tokens of any leading shape, float32 parameters cast to a dtype of
    computation, a pipeline.
    """

    selects: ClassVar[bool] = True  # whether experts are chosen, by the method `config.selection`
    not_by_token: ClassVar[str] = (
        ""  # why it can't process a text token by token, the end of "for ..."; "": it can
    )
    padding_counts: ClassVar[bool] = (
        False  # whether padding after a text has a say in what its tokens get
    )
    needs_key: ClassVar[bool] = (
        False  # whether it draws at random in training, beside what the method draws
    )
    needs_place: ClassVar[bool] = (
        False  # whether it goes by the number of its layer and by positions
    )
    gathers_experts: ClassVar[bool] = False  # whether each device computes with the experts of all
    # Forward passes of a training step. With 2, both have losses and gradients, and what they
    # differ in is a loss as well, of the weight `consistency_weight` in the settings.
    passes: ClassVar[int] = 1
    score_name: ClassVar[str] = "mean_logit"  # what `LayerStats.mean_score` is
    routing_note: ClassVar[str] = ""  # a sentence that a report of its choices needs beside it
    for_all_tokens: ClassVar[
        tuple
    ] = ()  # names of weights that every token uses; the others are those of single experts

    config: ExpertsConfig
    dtype: Any = jnp.float32
    balance: BalanceConfig = BalanceConfig()
    recompute: bool = False  # model.remat="experts"
    transport: str = "ring"  # MeshConfig.transport
    settings: Any = (
        None  # the configuration group of the kind or of the selection method, where one has any
    )
    training: bool = False

    @classmethod
    def experts_per_token(cls, config: ExpertsConfig):
        """Mean number of experts that process a token, or None where the scores decide it."""
        return SELECTIONS[config.selection].experts_per_token(config) if cls.selects else 1

    @classmethod
    def flops_beside_experts(cls, config: Config, shared):
        """Useful FLOPs per token of a forward pass, but for those of its experts; `shared` weights
        are `for_all_tokens`.
        """
        return 2 * shared

    @staticmethod
    def in_words(experts: ExpertsConfig) -> str:
        """What tables call the layer."""
        return experts.kind

    @staticmethod
    def not_causal_because(experts: ExpertsConfig) -> str:
        """Why a token depends on later ones, or on other sequences, whatever the selection; empty:
        it doesn't.
        """
        return ""

    @property
    def method(self):
        """The selection method."""
        return SELECTIONS[self.config.selection]

    @nn.compact
    def __call__(
        self, x, token_weights=None, routing_state=None, attention=None, number=0, positions=None
    ):
        """Applies the layer, on the mesh in context where there is one (`jax.set_mesh`).

        Args:
          x: tokens `[..., d]`; on a mesh `[B, S, d]` or `[T, d]`.
          token_weights: `[...]`, 1 for a token that counts in the statistics and balance losses, 0
            for padding; None: all.
          routing_state: of this layer, what its selection method has beside parameters, see
            `Selection.initial_state`; None: that before training.
          attention: `[..., H]`, `selection.base.Given.attention`, which some methods need.
          number: of the layer in its model, for kinds with `needs_place`.
          positions: `[...]` int32, of tokens in their sequences, likewise; None: counted along the
            last axis but d.

        Returns:
          `(y, stats)`: `[..., d]` in the dtype of computation, and `balance.LayerStats`. With
            sparse scoring the statistics
          have a gradient only where `balance` has a loss.

        Raises:
          ValueError: the method needs `attention`, and there is none.
        """
        if self.selects and self.method.needs_attention and attention is None:
            raise ValueError(
                f"selection {self.config.selection!r} goes by the attention before the experts; give it"
            )
        weights = {
            name: self.param(name, init, shape)
            for name, (init, shape) in self.weights(x.shape[-1]).items()
        }
        of_method = self.method.parameters(self.config, self.settings) if self.selects else {}
        of_method = {
            name: self.param(name, init, shape) for name, (init, shape) in of_method.items()
        }
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
                *(
                    devices,
                    token_weights,
                    self.settings,
                    state,
                    parameters,
                    flat,
                    key,
                    self.training,
                ),
                attention=attention,
                number=number,
                positions=positions,
            )
            y, stats, per_token = self.process(devices, flat, given, weights)
            return (
                y.reshape(x.shape),
                stats,
                jax.tree.map(lambda a: a.reshape(x.shape[:-1]), per_token),
            )

        tokens = min(x.ndim - 1, 2)
        in_specs = (
            parallel.token_spec(tokens, None),
            parallel.token_spec(tokens),
            parallel.token_spec(tokens, None),
            PartitionSpec(),
            parallel.weight_specs(weights),
        )
        out_specs = (
            parallel.token_spec(tokens, None),
            PartitionSpec(),
            parallel.token_spec(tokens),
        )
        run = parallel.over_mesh(process, in_specs, out_specs, self.transport)
        if not routing_state and self.selects:
            routing_state = self.method.initial_state(
                self.config, self.balance, self.settings, x.shape[-1]
            )
        of_layer = (routing_state or {}, of_method, key, number)
        of_tokens = token_weights, positions
        y, stats, per_token = run(x.astype(self.dtype), of_tokens, attention, of_layer, weights)
        return y, stats._replace(per_token=per_token) if per_token else stats

    def select(self, given, scores, balance_scores):
        """The select and balance stations: `(Assignment, LayerStats, per-token values)`; arguments
        as in `pipeline`.
        """
        scores, balance_scores = (checkpoint_name(s, SELECTION) for s in (scores, balance_scores))
        with jax.named_scope("select"):
            choice = self.method.choose(self.config, scores, given)
        with jax.named_scope("balance"):
            stride, total = self.balance.aux_stride, given.devices.total
            stats = layer_stats(
                scores, balance_scores, choice.assignment, given.token_weights, stride, total
            )
            if self.balance.z_weight:
                stats = stats._replace(
                    z_loss=z_loss(balance_scores, given.token_weights[::stride], total)
                )
            if self.training and self.balance.aux_batch == "sequence":
                loss = self._sequence_loss(given, balance_scores, choice.assignment)
                stats = stats._replace(sequence_loss=loss)
        return (
            choice.assignment,
            stats._replace(records=choice.records, live=choice.live),
            choice.per_token,
        )

    def _sequence_loss(self, given, balance_scores, assignment):
        devices = given.devices
        devices.check_sequences()
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
        assignment, stats, per_token = self.select(given, scores, balance_scores)
        return self.process_chosen(devices, x, assignment, gate, weights), stats, per_token

    def process_chosen(self, devices, x, assignment, gate, weights):
        """The stations after selection; the kinds of expert differ in their gate.

        `x [t, d]`; `weights` are float32 parameters by name, pieces of those of this device's
        experts, `w_p` and `w_o` among them.
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
            # Cast here, where it is computed again: a cast copy of all weights is not kept, nor are
            # whole ones.
            with jax.named_scope("experts"):
                w = {
                    name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()
                }
            with jax.named_scope("dispatch"):
                x = transport.gather(x)
                round = transport.round(plan, 0)
                rows = transport.dispatch(x, round)
            with jax.named_scope("experts"):
                pre_activations, c_rows = gate(rows, round, transport.groups(round), w)
                if c.sparse_scoring:
                    norms = transport.slot_values(scoring.activation_norms(c_rows), round, n_slots)
                    of_round = partial(_norms_of_round, transport, n_slots)
                    norms = transports.sum_over_rounds(
                        of_round, norms, n_rounds, plan, (x, w["w_down"])
                    )
                    slot_weight = weigh_chosen(assignment, transport.complete(norms)).weight
            y = _rows_to_tokens(transport, round, rows, pre_activations, slot_weight, w, x.shape[0])
            of_round = partial(_output_of_round, transport, gate)
            y = transports.sum_over_rounds(of_round, y, n_rounds, plan, (x, slot_weight, w))
            with jax.named_scope("combine"):
                return transport.scatter(y)

        return self.rematerialised(devices, experts)(x, assignment.weight, weights)

    def rematerialised(self, devices, experts):
        """The same function of arrays, which keeps for its backward pass what `model.remat` says."""
        if self.recompute:
            return jax.checkpoint(
                experts, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_RESIDUAL)
            )
        return devices.without_whole_weights(experts, self.gathers_experts)
