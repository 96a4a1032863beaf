"""A router layer whose experts are chosen by the norms of what they compute (the paper's Tables 1,
6 and 7).

All experts run up to a node, the norms there stand for the router's logits, and the top K experts
go on.

t tokens of a device, T tokens of the expert axis, d model width, n experts, f expert width, K
chosen per token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aoe_jax.experts.layer import whole_gate
from aoe_jax.experts.router import RouterLayer
from aoe_jax.experts.scoring import router_logits

# What an expert has computed of tokens `x [T, d]` where it pauses, from its `w_g`, `w_p` `[d, f]`
# and `w_o` `[f, d]`.
NODES = {
    "x Wg": lambda x, w: x @ w["w_g"],
    "x Wp": lambda x, w: x @ w["w_p"],
    "SiLU(x Wg)": lambda x, w: jax.nn.silu(x @ w["w_g"]),
    "SiLU(x Wg) * x Wp": lambda x, w: jax.nn.silu(x @ w["w_g"]) * (x @ w["w_p"]),
    "output": lambda x, w: (jax.nn.silu(x @ w["w_g"]) * (x @ w["w_p"])) @ w["w_o"],
}
NORMS = {
    "L1": lambda a: jnp.abs(a).sum(axis=-1),
    "L2": lambda a: jnp.sqrt(jnp.square(a).sum(axis=-1)),
    "Linf": lambda a: jnp.abs(a).max(axis=-1),
}

# A choice is a function `(devices, x [t, d], router logits [t, n], float32 weights by name, dtype)
# -> scores [t, n]`.


def by_router(devices, x, logits, weights, dtype):
    """The model's own choice."""
    return logits


def by_chance(devices, x, logits, weights, dtype):
    """Any experts, others in each layer and for each token of a batch; the same on every mesh."""
    n_tokens = x.shape[0] * devices.total_size
    # What differs from layer to layer, and not from device to device.
    layer = jax.lax.bitcast_convert_type(weights["w_router"].astype(jnp.float32).sum(), jnp.int32)
    key = jax.random.fold_in(jax.random.key(0), layer)
    return devices.own_tokens(jax.random.uniform(key, (n_tokens, logits.shape[1])))


def by_norm(node, norm):
    """The choice by a norm (of `NORMS`) of what experts have computed at a node (of `NODES`)."""

    def choose(devices, x, logits, weights, dtype):
        tokens = devices.gather(x, "expert")
        whole = {
            name: devices.gather_weight(name, weights[name], dtype)
            for name in ("w_g", "w_p", "w_o")
        }
        # One expert after another: the activations of all would be the largest array of the model.
        norms = jax.lax.map(
            lambda w: NORMS[norm](NODES[node](tokens, w).astype(jnp.float32)), whole
        )
        return devices.exchange(norms.T, split=0, concatenate=1)

    return choose


class ProbeLayer(RouterLayer):
    """A router layer whose experts are chosen by something else; its statistics are `(LayerStats,
    agreement)`.

    The agreement is the mean share of a token's experts that the router would have chosen, over
    tokens that count.
    """

    choose: Callable = by_router
    equal_weights: bool = (
        False  # the chosen weigh 1 / K each; otherwise the softmax of their scores (Algorithm 2)
    )

    def process(self, devices, x, given, weights):
        """As in `RouterLayer`."""
        weights, k = dict(weights), self.config.top_k
        with jax.named_scope("score"):
            logits = router_logits(x, weights["w_router"])
            scores = self.choose(devices, x, logits, weights, self.dtype)
            chosen, routed = (
                jax.nn.one_hot(jax.lax.top_k(s, k)[1], s.shape[1]).sum(axis=1)
                for s in (scores, logits)
            )
        in_common = (chosen * routed).sum(axis=1) / k
        agreement = devices.total(jnp.sum(in_common * given.token_weights)) / devices.total(
            given.token_weights.sum()
        )
        scores = chosen if self.equal_weights else scores
        del weights["w_router"]
        y, stats, _ = self.pipeline(devices, x, given, scores, scores, whole_gate, weights)
        return y, (stats, agreement), None
