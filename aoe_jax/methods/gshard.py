"""GShard's token choice of two experts (Lepikhin et al. 2020, arXiv 2006.16668), without capacity.

    e1, e2 = the two experts of highest score;  w1, w2 = softmax over their two scores
    training:   y = w1 E_e1(x) + [u < 2 w2] w2 E_e2(x),  u uniform in [0, 1), drawn for every token
    evaluation: y = w1 E_e1(x) + w2 E_e2(x)
    loss = aux_weight n sum_i f_i P_i,  f_i fraction of tokens with first choice i, P_i mean of g_i

Here g is the softmax over all scores. Two details follow the paper's Algorithm 1 from memory,
unchecked: w2 in `2 w2` is the normalised weight, and w1 does not change if the second expert is
not drawn. In evaluation both experts are used, which is this project's choice. The loss is the
paper's `mean_i(f_i P_i)` times n^2, as Switch scales it: it is 1 in perfect balance, and n if all
tokens choose one expert. The method is causal, because a draw does not depend on other tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.load_balance import balance_loss
from aoe_jax.moe.routing import Method, by_token
from aoe_jax.moe.scoring import KEPT_ROUTING


def top_two(scores, uniform=None):
    """Routes each token to its two experts of highest `scores [T, n]` float32, in `P = 2 T` slots.

    The second expert is dropped where `uniform [T]`, in [0, 1), is at least twice its weight. If
    `uniform` is None, no expert is dropped.
    """
    n_experts = scores.shape[1]
    expert = jax.lax.top_k(jax.lax.stop_gradient(scores), 2)[1]
    weight = jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1))
    if uniform is not None:
        is_drawn = uniform < 2 * jax.lax.stop_gradient(weight[:, 1])
        expert = expert.at[:, 1].set(jnp.where(is_drawn, expert[:, 1], n_experts))
    expert = checkpoint_name(expert, KEPT_ROUTING)
    return by_token(expert, jnp.where(expert < n_experts, weight, 0))


@dataclass(frozen=True)
class GShard(Method):
    """Routes each token to two experts; training draws at random whether the second one is used."""

    name = "gshard"

    # Weight of the balance loss of first choices; the loss is 1 in perfect balance.
    aux_weight: float = setting(0.01, at_least=0, training_only=True)

    def __call__(self, scores, weights, ctx):
        uniform = None
        if ctx.training:
            shape = (scores.shape[0] * ctx.devices.total_size,)
            uniform = ctx.devices.own_tokens(jax.random.uniform(ctx.key(), shape))
        routing = top_two(scores, uniform)
        first = jax.nn.one_hot(routing.expert[::2], scores.shape[1]) * ctx.token_weights[:, None]
        first, n_tokens = ctx.devices.total((first.sum(axis=0), ctx.token_weights.sum()))
        return routing._replace(shares={"first_choices": first / jnp.maximum(n_tokens, 1)})

    def losses(self, stats, state, weights):
        loss = balance_loss(stats.shares["first_choices"], stats.mean_probability).mean()
        return {"first_choice_loss": (self.aux_weight, loss)}

    def check(self, config):
        if config.experts.top_k != 2:
            config.experts.refuse("top_k", "routing.name='gshard' takes two experts; set 2")
        why = "is the balance loss of both choices, and gshard has its own; set 0"
        config.balance.refuse_losses(why, ("aux_weight",))
