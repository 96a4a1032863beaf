"""Defines a new routing method, and applies it in an AoE layer and in an MoE layer.

    python examples/add_a_method.py

docs/start_method.md explains such a class, and how `train.py` can use it.
"""

from dataclasses import dataclass

import jax

from aoe_jax import AoE, MoE
from aoe_jax.moe.routing import Method, by_mask


@dataclass(frozen=True)
class AboveMean(Method):
    """Selects the experts above a token's mean score. Weights are the softmax of their scores."""

    name = "above_mean"

    def __call__(self, scores, weights, ctx):
        """Routes tokens by their scores `[T, n]`; returns a `Routing`."""
        chosen = scores > scores.mean(axis=1, keepdims=True)
        return by_mask(chosen, jax.nn.softmax(scores, where=chosen, axis=1))


def experts_per_token():
    """Returns the mean number of experts per token in each kind of layer."""
    x, found = jax.random.normal(jax.random.key(0), (64, 48)), {}
    for layer in (AoE, MoE):
        layer = layer(n_experts=8, top_k=2, d_ffn=32, routing=AboveMean())
        params = jax.jit(layer.init)(jax.random.key(1), x)
        _, aux = jax.jit(layer.apply)(params, x)
        found[type(layer).__name__] = float(aux.stats.load.sum())
    return found


if __name__ == "__main__":
    print(experts_per_token())
