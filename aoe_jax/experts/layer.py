"""Layers of experts as Linen modules: parameters, and the one pipeline score, select, dispatch, experts, combine.

Initialisation preserves variance, for every kind alike: matrices are drawn at `1 / sqrt(fan_in)`, so that for tokens of
unit mean square the gate pre-activations start at variance 1, be they `x Wg` or `(x Wdown) Wup`. Where the paper is silent:
with both factors drawn at one small std, the product would start the gate many times smaller than an unfactorised one.
The norms then start near `sqrt(r)` with a spread of `1 / sqrt(2)` over experts, close to the spread 1 of router logits.

T tokens, d model width, n experts, N rows, r low rank (d_low), w expert width.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config import BalanceConfig, ExpertsConfig
from aoe_jax.experts import dispatch, scoring, selection
from aoe_jax.experts.balance import LayerStats, layer_stats
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, swiglu, weighted_product

matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)

# A selection method is one function from scores [T, n] to an Assignment; this is where it gets its settings, the token
# weights [T] where tokens compete with each other, and the selection bias [n] (or None) of loss-free balancing.
SELECTIONS = {
    "top_k": lambda c, token_weights, bias: partial(selection.top_k, k=c.top_k, gate=c.gate, bias=bias),
    "top_p": lambda c, token_weights, bias: partial(selection.top_p, threshold=c.top_p),
    "expert_choice": lambda c, token_weights, bias: partial(
        selection.expert_choice, capacity_factor=c.capacity_factor, token_weights=token_weights
    ),
}


class _ExpertsModule(nn.Module):
    """What the layers share: tokens of any leading shape, float32 parameters cast to a dtype of computation, a pipeline."""

    config: ExpertsConfig
    dtype: Any = jnp.float32
    balance: BalanceConfig = BalanceConfig()
    recompute: bool = False  # model.remat="experts"

    def __call__(self, x, token_weights=None, selection_bias=None):
        """Applies the layer.

        Args:
          x: tokens `[..., d]`.
          token_weights: `[...]`, 1 for a token that counts in the statistics and balance losses, 0 for padding; None: all.
          selection_bias: `[n]` float32 of loss-free balancing, or None.

        Returns:
          `(y, stats)`: `[..., d]` in the dtype of computation, and `balance.LayerStats`. With sparse scoring the statistics
          have a gradient only where `balance` has a loss.
        """
        shape = x.shape
        x = x.reshape(-1, shape[-1]).astype(self.dtype)
        token_weights = jnp.ones(x.shape[0]) if token_weights is None else token_weights.reshape(-1)
        y, stats = self.process(x, token_weights, selection_bias)
        return y.reshape(shape), stats

    def pipeline(self, x, token_weights, selection_bias, scores, balance_scores, gate, weights):
        """The stations after scoring; the kinds of expert differ in their gate.

        `gate(rows [N, d], assignment, plan, weights) -> (pre-activations [N, w], assignment)`; the assignment may get new
        weights for its slots. `weights` are float32 parameters by name, `w_p` and `w_o` among them.
        """
        c = self.config
        scores, balance_scores = (checkpoint_name(s, selection.SELECTION) for s in (scores, balance_scores))
        with jax.named_scope("select"):
            assignment = SELECTIONS[c.selection](c, token_weights, selection_bias)(scores)
        with jax.named_scope("balance"):
            stats = layer_stats(scores, balance_scores, assignment, token_weights, self.balance.aux_stride)
        with jax.named_scope("plan"):
            plan = dispatch.plan_rows(assignment, c.n_experts)

        def experts(x, slot_weight, weights):
            # Cast here, where it is computed again: a cast copy of all weights is not kept.
            w = jax.tree.map(lambda a: a.astype(self.dtype), weights)
            chosen = assignment._replace(weight=slot_weight)
            with jax.named_scope("dispatch"):
                rows = dispatch.dispatch(x, chosen, plan)
            with jax.named_scope("experts"):
                pre_activations, chosen = gate(rows, chosen, plan, w)
                row_weight = dispatch.row_weights(chosen, plan)
                rows = swiglu(rows, pre_activations, row_weight, w["w_p"], w["w_o"], plan.groups)
            with jax.named_scope("combine"):
                return dispatch.combine(rows, chosen, plan, x.shape[0])

        if self.recompute:
            experts = jax.checkpoint(experts, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_RESIDUAL))
        return experts(x, assignment.weight, weights), stats


class AoELayer(_ExpertsModule):
    """Autonomy-of-Experts layer (Algorithm 2): experts ranked by the norm of their own low-rank activations, no router."""

    @nn.compact
    def process(self, x, token_weights, selection_bias):
        """`x [T, d]`, `token_weights [T]` -> `([T, d], LayerStats)`."""
        c, d = self.config, x.shape[-1]
        width = c.width(d)
        weights = {
            "w_down": self.param("w_down", expert_init, (c.n_experts, d, c.d_low)),
            "w_up": self.param("w_up", expert_init, (c.n_experts, c.d_low, width)),
            "w_p": self.param("w_p", expert_init, (c.n_experts, d, width)),
            "w_o": self.param("w_o", expert_init, (c.n_experts, width, d)),
        }
        stride = self.balance.aux_stride
        if c.sparse_scoring:
            with jax.named_scope("score"):
                operands = (x, weights["w_down"])
                if not self.balance.has_loss:
                    operands = jax.lax.stop_gradient(operands)
                scores, balance_scores = scoring.sparse_scores(*operands, stride)

            def gate(rows, assignment, plan, w):
                c_rows = checkpoint_name(grouped_matmul(rows, w["w_down"], plan.groups), EXPERT_RESIDUAL)
                norms = dispatch.slot_values(scoring.activation_norms(c_rows), plan)
                return grouped_matmul(c_rows, w["w_up"], plan.groups), selection.weigh_chosen(assignment, norms)

        else:
            with jax.named_scope("score"):
                cache = scoring.low_rank_activations(x, weights["w_down"].astype(x.dtype))
                scores = scoring.activation_norms(cache)
            balance_scores = scores[::stride]

            def gate(rows, assignment, plan, w):
                c_rows = dispatch.take_activations(cache, assignment, plan)
                return grouped_matmul(c_rows, w["w_up"], plan.groups), assignment

        return self.pipeline(x, token_weights, selection_bias, scores, balance_scores, gate, weights)


class RouterLayer(_ExpertsModule):
    """Traditional mixture-of-experts layer (Algorithm 1), with Table 2's ablations: factorised gate, large router."""

    @nn.compact
    def process(self, x, token_weights, selection_bias):
        """`x [T, d]`, `token_weights [T]` -> `([T, d], LayerStats)`."""
        c, d = self.config, x.shape[-1]
        width = c.width(d)
        with jax.named_scope("score"):
            if c.large_router:
                hidden = c.large_router_width(d)
                w_hidden = self.param("w_router_hidden", matrix_init, (d, hidden))
                w_router = self.param("w_router", matrix_init, (hidden, c.n_experts))
                scores = scoring.large_router_logits(x, w_hidden, w_router)
            else:
                scores = scoring.router_logits(x, self.param("w_router", matrix_init, (d, c.n_experts)))
        weights = {
            "w_p": self.param("w_p", expert_init, (c.n_experts, d, width)),
            "w_o": self.param("w_o", expert_init, (c.n_experts, width, d)),
        }
        if c.factorised_gate:
            weights["w_down"] = self.param("w_down", expert_init, (c.n_experts, d, c.d_low))
            weights["w_up"] = self.param("w_up", expert_init, (c.n_experts, c.d_low, width))

            def gate(rows, assignment, plan, w):
                c_rows = checkpoint_name(grouped_matmul(rows, w["w_down"], plan.groups), EXPERT_RESIDUAL)
                return grouped_matmul(c_rows, w["w_up"], plan.groups), assignment

        else:
            weights["w_g"] = self.param("w_g", expert_init, (c.n_experts, d, width))

            def gate(rows, assignment, plan, w):
                return checkpoint_name(grouped_matmul(rows, w["w_g"], plan.groups), EXPERT_RESIDUAL), assignment

        balance_scores = scores[:: self.balance.aux_stride]
        return self.pipeline(x, token_weights, selection_bias, scores, balance_scores, gate, weights)


class DenseLayer(_ExpertsModule):
    """One SwiGLU of width `d_ffn` for every token: the baseline without experts. Its statistics are those of one expert."""

    @nn.compact
    def process(self, x, token_weights, selection_bias):
        """`x [T, d]`, `token_weights [T]` -> `([T, d], LayerStats)`."""
        d, width = x.shape[-1], self.config.d_ffn
        shapes = {"w_g": (d, width), "w_p": (d, width), "w_o": (width, d)}
        w = {name: self.param(name, matrix_init, shape).astype(self.dtype) for name, shape in shapes.items()}
        y = weighted_product(x @ w["w_g"], x @ w["w_p"], jnp.ones(x.shape[0])) @ w["w_o"]
        one, zero = jnp.ones(1), jnp.zeros(())
        return y, LayerStats(load=one, mean_probability=one, confidence_entropy=zero, mean_score=one, score_spread=zero)


LAYERS = {"aoe": AoELayer, "router": RouterLayer, "dense": DenseLayer}
