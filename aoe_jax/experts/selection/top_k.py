"""Token choice of the K best experts, with loss-free balancing by a bias: the paper's selection.

T tokens, n experts, K chosen per token, L layers.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.balance import updated_bias
from aoe_jax.experts.selection.assignment import SELECTION, by_token
from aoe_jax.experts.selection.base import Choice, Selection


def top_k(scores, k, gate="chosen", bias=None, jitter=0.01):
    """Token choice: each token goes to the `k` experts of highest score; ties go to the lower
    expert number.

    Args:
      scores: `[T, n]` float32.
      k: experts per token.
      gate: weights are the softmax over the `"chosen"` scores (Algorithms 1 and 2), or over `"all"`
        n scores and not renormalised (the authors' released code), or those of
        `sparsemixer_weights`.
      bias: `[n]`, added to the scores for the choice, not for the weights: loss-free balancing
        (Wang et al. 2024, arXiv 2408.15664), see `balance.updated_bias`. None: no bias.
      jitter: of `sparsemixer_weights`.

    Returns:
      An `Assignment` with `P = T k`.
    """
    expert = checkpoint_name(best_experts(scores, bias, k), SELECTION)
    if gate == "all":
        weight = jnp.take_along_axis(jax.nn.softmax(scores), expert, axis=1)
    elif gate == "sparsemixer":
        weight = sparsemixer_weights(scores, expert, jitter)
    else:
        weight = jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1))
    return by_token(expert, weight)


def best_experts(scores, bias, k):
    """The numbers of the k experts of highest score plus bias, `[T, k]` int32; `bias [n]` or None."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores if bias is None else scores + bias), k)[1]


def sparsemixer_weights(scores, expert, jitter):
    """The weights of the chosen experts `[T, k]` by SparseMixer-v2 as used once trained (GRIN,
    arXiv 2409.12136).

    The i-th expert is weighed by the softmax over the scores that were left when it was chosen and
    lie near its own: below it by at most `2 jitter` of the larger of the two in size. Its training,
    which samples, is not part of it.

    Args:
      scores: `[T, n]` float32.
      expert: `[T, k]` int32, the experts by falling score.
      jitter: see above.
    """
    n_experts, weights = scores.shape[1], []
    left = scores
    for chosen in expert.T:
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)
        # Where both are zero, 0 / 0 is not far.
        is_far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * jitter
        probability = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left))
        weights.append(jnp.take_along_axis(probability, chosen[:, None], axis=1))
        left = jnp.where(chosen[:, None] == jnp.arange(n_experts), -jnp.inf, left)
    return jnp.concatenate(weights, axis=1)


class TopK(Selection):
    """`experts.selection="top_k"`: state `selection_bias [n]` where `balance.bias_rate` asks for
    loss-free balancing.
    """

    fields = ("top_k", "gate")
    all_slots_used = True

    def experts_per_token(self, experts):
        """K."""
        return experts.top_k

    def initial_state(self, experts, balance, settings, d):
        """As in `Selection`."""
        return {"selection_bias": jnp.zeros(experts.n_experts)} if balance.bias_rate else {}

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        bias = given.state.get("selection_bias")
        return Choice(top_k(scores, experts.top_k, experts.gate, bias, experts.router_jitter))

    def next_state(self, config, state, stats):
        """As in `Selection`."""
        if "selection_bias" not in state:
            return state
        bias = updated_bias(
            state["selection_bias"], stats.load, stats.score_spread, config.balance.bias_rate
        )
        return {"selection_bias": bias}
