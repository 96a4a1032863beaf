"""GShard's token choice of two experts (Lepikhin et al. 2020, arXiv 2006.16668), without its
capacity.

    e1, e2 = the two experts of highest gate g = softmax(scores);  w1 = g[e1] / (g[e1] + g[e2]),  w2 = 1 - w1
    in training:  y = w1 E_e1(x) + [u < 2 w2] w2 E_e2(x),  u uniform in [0, 1), drawn for every token
    elsewhere:    y = w1 E_e1(x) + w2 E_e2(x)
    loss = aux_weight n sum_i f_i P_i,  f_i the share of tokens whose first choice is i, P_i the mean of g[i]

From memory of the paper's Algorithm 1, not from its text: that the gate in `2 w2` is the normalised
one, and that `w1` stays as it is where the second expert isn't drawn. That evaluation takes both is
this project's choice. The loss is the paper's, `mean_i(f_i P_i)`, times n^2, which puts it on the
scale of Switch: 1 in perfect balance, n in collapse. L_aux (`balance.aux_weight`), which counts
both choices, is another loss. Nothing is dropped, since experts have no capacity here. Causal: each
token goes by itself, and what is drawn doesn't depend on tokens.

t tokens of a device, n experts.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.selection.assignment import SELECTION, by_token
from aoe_jax.experts.selection.base import Choice, Selection


def top_two(scores, uniform=None):
    """The two experts of highest score, the second as it is drawn.

    Args:
      scores: `[t, n]` float32.
      uniform: `[t]`, numbers from 0 to 1, above twice its weight for a second expert that isn't to
        be; None: all are.

    Returns:
      An `Assignment` with `P = 2 t`.
    """
    n_experts = scores.shape[1]
    expert = jax.lax.top_k(jax.lax.stop_gradient(scores), 2)[1]
    weight = jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1))
    if uniform is not None:
        is_drawn = uniform < 2 * jax.lax.stop_gradient(weight[:, 1])
        expert = expert.at[:, 1].set(jnp.where(is_drawn, expert[:, 1], n_experts))
    expert = checkpoint_name(expert, SELECTION)
    return by_token(expert, jnp.where(expert < n_experts, weight, 0))


class GShard(Selection):
    """`experts.selection="gshard"`."""

    balances_by = "its loss of first choices"
    needs_key = True
    shares = ("first_choices",)

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        devices, uniform = given.devices, None
        if given.key is not None:
            of_all = jax.random.uniform(given.key, (scores.shape[0] * devices.total_size,))
            uniform = devices.own_tokens(of_all)
        assignment = top_two(scores, uniform)
        first = (
            jax.nn.one_hot(assignment.expert[::2], scores.shape[1]) * given.token_weights[:, None]
        )
        first, n_tokens = devices.total((first.sum(axis=0), given.token_weights.sum()))
        return Choice(assignment, {"first_choices": first / jnp.maximum(n_tokens, 1)})

    def losses(self, config, stats, per_token, state, token_weights, weights):
        """As in `Selection`."""
        loss = balance_loss(stats.records["first_choices"], stats.mean_probability).mean()
        return {"first_choice_loss": (config.gshard.aux_weight, loss)}
