"""DA-MoE (Aghdam et al. 2024, arXiv 2409.06669): attention determines a token's number of experts.

    K[t] = ceil(importance[t] K_max), at least 1;  token t uses its K[t] experts of highest score

Weights are the softmax over these scores; K_max is `experts.top_k`. In DA-MoE the importance of a
token is computed from attention weights, without extra parameters. The paper's formulas were not
available, so the formulas below are this project's. The importance is `(N p - 1) / (N - 1)`, where
p is the largest attention probability of the token over the N tokens that it attends to. It is 0
for uniform attention, 1 for attention to one token, and 0 if N is 1. It is computed for each head,
from one more product of the layer's queries and keys; `reduce` combines the results of the heads.

K[t] has no gradient. A layer reserves K_max slots per token and computes only the used slots. L_aux
counts only used slots. The method is causal.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Hooks, Method, by_token
from aoe_jax.moe.scoring import KEPT_ROUTING

REDUCE = {"mean": jnp.mean, "max": jnp.max}


def concentration(peaks, n_visible):
    """How concentrated the attention of a query is: 0 if it is uniform, 1 if it is on one key.

    `peaks [...]` are the largest probabilities. `n_visible`, which broadcasts to `peaks`, is N, the
    number of keys that a query attends to. Returns `(N peak - 1) / (N - 1)`; 0 where N is 1.
    """
    n = jnp.asarray(n_visible, peaks.dtype)
    return jnp.where(n > 1, jnp.clip((n * peaks - 1) / jnp.maximum(n - 1, 1), 0, 1), 0)


def head_importance(q, k, visible):
    """The importance of each token in each head, for `Hooks.attention`: `[B, H, S]` float32 or
    wider, without a gradient. Heads are computed one by one, so only one `[B, S, c]` is in memory.
    """
    q, k = jax.lax.stop_gradient((q.swapaxes(0, 1), k.swapaxes(0, 1)))
    share, dtype = q.shape[0] // k.shape[0], jnp.promote_types(q.dtype, jnp.float32)

    def of_head(head):
        scores = jnp.einsum("bqi,bki->bqk", q[head], k[head // share], preferred_element_type=dtype)
        scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
        return concentration(jax.nn.softmax(scores).max(axis=-1), visible.sum(axis=-1))

    return jax.lax.map(of_head, jnp.arange(q.shape[0])).swapaxes(0, 1)


def experts_of(importance, k_max):
    """The number of experts of a token: `importance [...]` from 0 to 1 -> `[...]` int32."""
    return jnp.clip(jnp.ceil(importance * k_max), 1, k_max).astype(jnp.int32)


def best(scores, count, k_max):
    """Routes each token to its `count [T]` experts of highest score, with softmax weights.

    `scores [T, n]`, `count` from 1 to `k_max` -> a `Routing` with `P = T k_max` slots.
    """
    n_experts = scores.shape[1]
    expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k_max)[1]
    expert = jnp.where(jnp.arange(k_max) < count[:, None], expert, n_experts)
    expert = checkpoint_name(expert, KEPT_ROUTING)
    chosen = jnp.take_along_axis(scores, expert, axis=1, mode="fill", fill_value=-jnp.inf)
    return by_token(expert, jax.nn.softmax(chosen))


@dataclass(frozen=True)
class DAMoE(Method):
    """Routes a token to 1 to `experts.top_k` experts; concentrated attention selects more."""

    name = "da_moe"
    hooks = Hooks(attention=head_importance)

    reduce: str = setting("mean", choices=tuple(REDUCE))  # of the importances in all heads

    def __call__(self, scores, weights, ctx):
        if ctx.captured is None:
            raise ValueError(f"router {self.name!r} works only in a decoder, after attention")
        importance = REDUCE[self.reduce](ctx.captured, axis=1)
        return best(scores, experts_of(importance, ctx.top_k), ctx.top_k)
