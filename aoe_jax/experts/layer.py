"""Layers of experts as Linen modules: parameters, and the one pipeline score, select, dispatch, experts, combine.

Initialisation preserves variance, for every kind alike: matrices are drawn at `1 / sqrt(fan_in)`, so that for tokens of
unit mean square the gate pre-activations start at variance 1, be they `x Wg` or `(x Wdown) Wup`. Where the paper is silent:
with both factors drawn at one small std, the product would start the gate many times smaller than an unfactorised one.
The norms then start near `sqrt(r)` with a spread of `1 / sqrt(2)` over experts, close to the spread 1 of router logits.

T tokens, d model width, n experts, P rows, r low rank (d_low), w expert width.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.config import ExpertsConfig
from aoe_jax.experts import balance, dispatch, scoring, selection
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.swiglu import swiglu

matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)

# A selection method is one function from scores [T, n] to an Assignment; this is where it gets its settings, and the token
# weights [T] where tokens compete with each other.
SELECTIONS = {
    "top_k": lambda c, _: partial(selection.top_k, k=c.top_k, gate=c.gate),
    "top_p": lambda c, _: partial(selection.top_p, threshold=c.top_p),
    "expert_choice": lambda c, token_weights: partial(
        selection.expert_choice, capacity_factor=c.capacity_factor, token_weights=token_weights
    ),
}


def _run_pipeline(x, token_weights, config, scores, gate, w_p, w_o):
    """The stations after scoring; `gate(rows, assignment, plan) -> [P, w]` is what the kinds of expert differ in."""
    with jax.named_scope("select"):
        assignment = SELECTIONS[config.selection](config, token_weights)(scores)
    with jax.named_scope("balance"):
        stats = balance.layer_stats(scores, assignment, token_weights)
    with jax.named_scope("dispatch"):
        plan = dispatch.plan_rows(assignment, config.n_experts)
        rows = dispatch.dispatch(x, assignment, plan)
    with jax.named_scope("experts"):
        rows = swiglu(rows, gate(rows, assignment, plan), w_p, w_o, plan.group_sizes)
    with jax.named_scope("combine"):
        return dispatch.combine(rows, assignment, plan, x.shape[0]), stats


class _ExpertsModule(nn.Module):
    """What the layers share: tokens of any leading shape, and float32 parameters cast to the dtype of computation."""

    config: ExpertsConfig
    dtype: Any = jnp.float32

    def __call__(self, x, token_weights=None):
        """Applies the layer.

        Args:
          x: tokens `[..., d]`.
          token_weights: `[...]`, 1 for a token that counts in the statistics and balance losses, 0 for padding; None: all.

        Returns:
          `(y, stats)`: `[..., d]` in the dtype of computation, and `balance.LayerStats`.
        """
        shape = x.shape
        x = x.reshape(-1, shape[-1]).astype(self.dtype)
        token_weights = jnp.ones(x.shape[0]) if token_weights is None else token_weights.reshape(-1)
        y, stats = self.process(x, token_weights)
        return y.reshape(shape), stats

    def weight(self, name, shape, init=expert_init):
        """A float32 parameter, cast to the dtype of computation."""
        return self.param(name, init, shape).astype(self.dtype)


class AoELayer(_ExpertsModule):
    """Autonomy-of-Experts layer (Algorithm 2): experts ranked by the norm of their own low-rank activations, no router."""

    @nn.compact
    def process(self, x, token_weights):
        """`x [T, d]`, `token_weights [T]` -> `([T, d], LayerStats)`."""
        c, d = self.config, x.shape[-1]
        width = c.width(d)
        w_down = self.weight("w_down", (c.n_experts, d, c.d_low))
        w_up = self.weight("w_up", (c.n_experts, c.d_low, width))
        w_p = self.weight("w_p", (c.n_experts, d, width))
        w_o = self.weight("w_o", (c.n_experts, width, d))
        with jax.named_scope("score"):
            cache = scoring.low_rank_activations(x, w_down)
            scores = scoring.activation_norms(cache)

        def gate(rows, assignment, plan):
            return grouped_matmul(dispatch.take_activations(cache, assignment, plan), w_up, plan.group_sizes)

        return _run_pipeline(x, token_weights, c, scores, gate, w_p, w_o)


class RouterLayer(_ExpertsModule):
    """Traditional mixture-of-experts layer (Algorithm 1), with Table 2's ablations: factorised gate, large router."""

    @nn.compact
    def process(self, x, token_weights):
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
        w_p = self.weight("w_p", (c.n_experts, d, width))
        w_o = self.weight("w_o", (c.n_experts, width, d))
        if c.factorised_gate:
            w_down = self.weight("w_down", (c.n_experts, d, c.d_low))
            w_up = self.weight("w_up", (c.n_experts, c.d_low, width))

            def gate(rows, assignment, plan):
                return grouped_matmul(grouped_matmul(rows, w_down, plan.group_sizes), w_up, plan.group_sizes)

        else:
            w_g = self.weight("w_g", (c.n_experts, d, width))

            def gate(rows, assignment, plan):
                return grouped_matmul(rows, w_g, plan.group_sizes)

        return _run_pipeline(x, token_weights, c, scores, gate, w_p, w_o)


class DenseLayer(_ExpertsModule):
    """One SwiGLU of width `d_ffn` for every token: the baseline without experts. Its statistics are those of one expert."""

    @nn.compact
    def process(self, x, token_weights):
        """`x [T, d]`, `token_weights [T]` -> `([T, d], LayerStats)`."""
        d, width = x.shape[-1], self.config.d_ffn
        w_g = self.weight("w_g", (d, width), matrix_init)
        w_p = self.weight("w_p", (d, width), matrix_init)
        w_o = self.weight("w_o", (width, d), matrix_init)
        y = (jax.nn.silu(x @ w_g) * (x @ w_p)) @ w_o
        one = jnp.ones(1)
        return y, balance.LayerStats(load=one, mean_probability=one, confidence_entropy=jnp.zeros(()), mean_score=one)


LAYERS = {"aoe": AoELayer, "router": RouterLayer, "dense": DenseLayer}
