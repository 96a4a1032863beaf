"""Routing-Free MoE (Liu et al., arXiv 2604.00801): every expert decides by itself whether it takes
a token.

    G[t, i] = ReLU(score[t, i] - b[i]);  token t goes to expert i where G >= theta;  weight = G[t, i], not normalised

b is a parameter. Over the experts of all layers together, with f[t, i] in {0, 1} for what is active
(G is 0 elsewhere):

    L = lambda (mu mean_i(mean_t(f) mean_t(G)) + (1 - mu) mean_t(mean_i(f) mean_i(G)))
    after each step  lambda <- lambda (1 + eta)^sign(share of active pairs - K / n),  at most 1

so that a token has K = `experts.top_k` experts a layer on average, however they are spread over
layers, experts and tokens.

Faithful to the paper; as in the authors' code, what is below theta counts as 0 in the losses and
lambda is at most 1. Their code also learns a factor for each score, which the paper doesn't have.
With AoE this is the published method, less their initialisation: norms start near the square root
of d_low here. Of micro-batches each has G of its own. A router's logits in place of norms are this
project's: they lie around 0, so few pairs are active from b = 0, and an expert that is never active
has no gradient to come back by. b then has to start below 0.

Causal: each token decides by itself, and lambda has no part in it. Costs n slots a token, in use or
not.

T tokens of the batch, t of this device, n experts, L layers, B sequences of S tokens.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, by_mask
from aoe_jax.experts.selection.base import Choice, Selection


def active_gates(scores, bias, threshold):
    """`scores [t, n]`, `bias [n]` -> `(active [t, n] bool, gates [t, n])`, the gates 0 where an
    expert isn't active.
    """
    gates = jax.nn.relu(scores - bias)
    active = checkpoint_name(jax.lax.stop_gradient(gates) >= threshold, SELECTION)
    return active, jnp.where(active, gates, 0)


def expert_balance(active, gates):
    """`mean_i f_i G_i` from means over tokens `[L, n]` of what is active and of the gates, over
    experts of all layers.
    """
    return (active * gates).mean()


def token_balance(active, gates, token_weights):
    """`mean_t f_t G_t` from means over the experts of each layer, `[L, B, S]`; `token_weights [B,
    S]`, 0 for padding.
    """
    product = active.mean(axis=0) * gates.mean(axis=0)
    return (product * token_weights).sum() / jnp.maximum(token_weights.sum(), 1)


def next_multiplier(multiplier, density, target, rate):
    """lambda after a step whose share of active pairs was `density`; at most 1."""
    return jnp.minimum(multiplier * (1 + rate) ** jnp.sign(density - target), 1)


class RoutingFree(Selection):
    """`experts.selection="routing_free"`: state `multiplier []`, lambda, the same in all layers."""

    fields = ("top_k",)
    balances_by = "its own losses"

    def parameters(self, experts, settings):
        """b."""
        return {"score_bias": (nn.initializers.constant(settings.bias), (experts.n_experts,))}

    def initial_state(self, experts, balance, settings, d):
        """As in `Selection`."""
        return {"multiplier": jnp.full((), settings.multiplier, jnp.float32)}

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        active, gates = active_gates(
            scores, given.parameters["score_bias"], given.settings.threshold
        )
        real = given.token_weights[:, None] > 0
        active, gates = active & real, jnp.where(real, gates, 0)
        assignment = by_mask(active, gates)
        if not given.training:
            return Choice(assignment)
        sums, count = given.devices.total((gates.sum(axis=0), given.token_weights.sum()))
        records = {"gates": sums / jnp.maximum(count, 1)}
        return Choice(
            assignment, records, {"active": active.mean(axis=1), "gates": gates.mean(axis=1)}
        )

    def losses(self, config, stats, per_token, state, token_weights, weights):
        """As in `Selection`."""
        share = config.routing_free.expert_share
        value = share * expert_balance(stats.load, stats.records["gates"])
        value += (1 - share) * token_balance(per_token["active"], per_token["gates"], token_weights)
        return {"density_loss": (state["multiplier"][0], value)}

    def next_state(self, config, state, stats):
        """As in `Selection`."""
        target = config.experts.top_k / config.experts.n_experts
        return {
            "multiplier": next_multiplier(
                state["multiplier"], stats.load.mean(), target, config.routing_free.rate
            )
        }
