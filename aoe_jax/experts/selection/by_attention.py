"""Experts per token from attention, in the manner of DA-MoE (Aghdam et al. 2024, arXiv 2409.06669):
"DA-MoE-style".

    K[t] = ceil(importance[t] K_max), at least 1;  experts of t: the K[t] of highest score, weighed by the softmax over them

K_max is `experts.top_k`. What is known of DA-MoE is that a token's importance comes from attention
weights as they are, without parameters of its own, that it decides how many experts the token has,
and that the router's scores decide which. Its formulas are not known here: importance and its map
to K are this project's. Two measures of importance:

- received (`received`), a reconstruction for encoders: the attention that a token receives,
  averaged over the queries that may see it, as a share of the most that a token of the sequence
  receives. It depends on later tokens, so the configuration refuses it: all models here are
  decoders.
- paid, for decoders: the largest of the token's attention probabilities over the N tokens that it
  sees, `p`, as `(N p - 1) / (N - 1)`: 0 where it attends to all alike, 1 where it attends to one
  alone. Without that, tokens with few before them would be important by their place. The first
  token of a document, which sees itself only, has 0. Causal, and another measure than attention
  received. `model/attention.py` gives it of each head, `by_attention.reduce` takes the mean over
  heads or their maximum.

A map to K by quantiles isn't offered: it would compare tokens with later ones. K has no gradient.
K_max slots are laid out for every token, and those in use are computed. L_aux counts the experts in
use. Attention gives the measure in passing, from sums that it has anyway; probabilities are not
stored.

t tokens, n experts, H heads, B sequences, S positions.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, by_token
from aoe_jax.experts.selection.base import Choice, Selection

REDUCE = {"mean": jnp.mean, "max": jnp.max}


def received(probabilities, visible, reduce="mean"):
    """How important tokens are by the attention that they receive; NOT CAUSAL.

    Args:
      probabilities: `[B, H, S, S]` float32, of queries and keys.
      visible: bool, which keys a query may see, `[B, H, S, S]` or what broadcasts to it; each key
        by one query at least.
      reduce: of `REDUCE`, over heads.

    Returns:
      `[B, S]`, above 0 to 1.
    """
    n_queries = jnp.broadcast_to(visible, probabilities.shape).sum(axis=2)
    mean = jnp.where(visible, probabilities, 0).sum(axis=2) / n_queries
    importance = REDUCE[reduce](mean, axis=1)
    return importance / importance.max(axis=1, keepdims=True)


def experts_of(importance, k_max):
    """How many experts a token has: `importance [...]` from 0 to 1 -> `[...]` int32 from 1 to
    `k_max`.
    """
    return jnp.clip(jnp.ceil(importance * k_max), 1, k_max).astype(jnp.int32)


def best(scores, count, k_max):
    """Token choice of the `count [t]` experts of highest score, from 1 to `k_max`: `scores [t, n]`
    -> an `Assignment`.

    It has `P = t k_max`; weights are the softmax over the chosen scores.
    """
    n_experts = scores.shape[1]
    expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k_max)[1]
    expert = checkpoint_name(
        jnp.where(jnp.arange(k_max) < count[:, None], expert, n_experts), SELECTION
    )
    chosen = jnp.take_along_axis(scores, expert, axis=1, mode="fill", fill_value=-jnp.inf)
    return by_token(expert, jax.nn.softmax(chosen))


class ByAttention(Selection):
    """`experts.selection="by_attention"`."""

    fields = ("top_k",)
    needs_attention = True

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        importance = REDUCE[given.settings.reduce](jax.lax.stop_gradient(given.attention), axis=1)
        return Choice(best(scores, experts_of(importance, experts.top_k), experts.top_k))
