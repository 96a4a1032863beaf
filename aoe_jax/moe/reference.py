"""Algorithms 1 and 2 of Autonomy-of-Experts (arXiv 2501.13074) as plain loops: the specification of
the fast implementations.

Every expert processes every token; the weight of an expert that is not chosen is zero. The
functions are differentiable and compute in the dtype of their arguments, which have these shapes:

    x        [T, d]      w_gate_down  [n, d, r]      w_up    [n, d, f]
    weights  [T, n]      w_gate_up    [n, r, f]      w_down  [n, f, d]
    w_router [d, n]      w_gate       [n, d, f]
"""

import jax
import jax.numpy as jnp


def l2_norm(c):
    """L2 norm over the last axis; its gradient at a zero vector is zero, not NaN."""
    square = jnp.sum(c * c, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def top_k_weights(p, top_k, norm_topk_prob=True):
    """The weights of the K experts of highest score, 0 for others: scores `p [T, n]` -> `[T, n]`.

    In ties the lower expert number wins. With `norm_topk_prob` weights are the softmax over the K
    chosen scores (the paper), otherwise the softmax over all n scores (the authors' released code).
    """

    def weights_of_token(p):
        chosen = jnp.argsort(-p, stable=True)[:top_k]
        weights = jax.nn.softmax(p[chosen]) if norm_topk_prob else jax.nn.softmax(p)[chosen]
        return jnp.zeros_like(p).at[chosen].set(weights)

    return jax.vmap(weights_of_token)(p)


def aoe_scores(x, w_score, score=l2_norm):
    """Scores `[T, n]`: the score of an expert is computed from its own activation.

    `w_score` is `w_gate_down`, or the first columns of whole gates, `w_gate[:, :, :s]`.
    """
    return jnp.stack([score(x @ w_score[i]) for i in range(w_score.shape[0])], axis=1)


def aoe_experts(x, weights, w_gate_down, w_gate_up, w_up, w_down):
    """`sum_i weights[:, i] E_i(x)` with AoE experts, `[T, d]`."""
    y = jnp.zeros_like(x)
    for i in range(w_gate_down.shape[0]):
        expert = (jax.nn.silu((x @ w_gate_down[i]) @ w_gate_up[i]) * (x @ w_up[i])) @ w_down[i]
        y = y + weights[:, i : i + 1] * expert
    return y


def router_experts(x, weights, w_gate, w_up, w_down):
    """`sum_i weights[:, i] E_i(x)` with traditional SwiGLU experts, `[T, d]`."""
    y = jnp.zeros_like(x)
    for i in range(w_gate.shape[0]):
        expert = (jax.nn.silu(x @ w_gate[i]) * (x @ w_up[i])) @ w_down[i]
        y = y + weights[:, i : i + 1] * expert
    return y


def aoe_layer(x, w_gate_down, w_gate_up, w_up, w_down, *, top_k, norm_topk_prob=True):
    """Algorithm 2, the Autonomy-of-Experts layer: `[T, d]`; K is `top_k`."""
    weights = top_k_weights(aoe_scores(x, w_gate_down), top_k, norm_topk_prob)
    return aoe_experts(x, weights, w_gate_down, w_gate_up, w_up, w_down)


def router_layer(x, w_router, w_gate, w_up, w_down, *, top_k, norm_topk_prob=True):
    """Algorithm 1, the traditional mixture-of-experts layer: `[T, d]`; K is `top_k`."""
    weights = top_k_weights(x @ w_router, top_k, norm_topk_prob)
    return router_experts(x, weights, w_gate, w_up, w_down)
