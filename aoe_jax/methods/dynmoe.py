"""DynMoE (Guo et al., arXiv 2405.14297): tokens are routed to any number of experts, and training
adds and removes experts.

    score c[t, i]: the cosine of token t and router column i
    gap[t, i] = ReLU(sigmoid(tau c[t, i]) - sigmoid(tau G[i]))
    expert i processes token t if gap > 0;  weight = 1 / (the number of the token's experts)

tau is the setting `temperature`. The threshold G[i] is a parameter with initial value 0, so at
first each token is routed to about half of the experts. In the computation a gate replaces the gap:
the gate is 1 if the gap is above 0, else 0, and has the gradient of the gap. So an expert gets no
gradient from tokens that it does not process. In training the output of a token without an expert
is 0; in evaluation such a token is routed to the expert of the highest score.

The layer has n places, each with the parameters of one expert; experts in use are "live". Every
period of `period_steps` steps begins with `idle_steps` steps without recording. The next
`record_steps` steps record how often each expert is chosen (R_E) and the sum of the tokens without
an expert (R_S). Then experts that were never chosen are removed. If R_S is not zero, an expert is
added at the first free place of the layer. Its router column is R_S / ||R_S|| and its threshold is
0. Its other matrices are those stored at the place, which weight decay has shrunk.

With a router the loss is the paper's: `||W' W - I||_F` over the normalised columns of live experts
("diversity") plus the mean length of all columns ("simplicity"), summed over layers as in the
authors' code. Two more terms of their code (a balance loss of gates, and the mean of all gates) and
its learned temperature are left out. Initial columns are almost orthogonal (in the paper: exactly).

The paper does not cover AoE. For AoE this project divides the norm ||x W_i|| by its root mean
square over random directions of x, and subtracts 1 (`relative_scores`); so the scores are around 0,
as cosines are. AoE has no router columns, so it has neither loss. The scoring matrix (`w_score`) of
a new expert is a matrix of rank one plus noise. The matrix of rank one has norm 1 and maps
R_S / ||R_S|| to the direction of R_S W, where W is the old matrix at the place; the noise is W
scaled to norm 0.1. The sum is scaled to the median norm of the live experts' matrices.

The method is causal, because each token is routed independently. It needs n slots per token.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Method, by_mask
from aoe_jax.moe.scoring import KEPT_ROUTING, activation_norms
from aoe_jax.parameters import vector, zeros_init

NOISE = 0.1  # norm of the noise in a new expert's `w_score`, whose rank-one part has norm 1
HIGHEST = jax.lax.Precision.HIGHEST


def relative_scores(scores, weights, ctx):
    """Returns scores `[T, n]` around 0 that do not depend on the lengths of tokens and weights.

    With a router they are the cosines of tokens and columns. With AoE they are
    `||x W_i|| sqrt(d) / (||x|| ||W_i||) - 1`, where W_i is the expert's `w_score`. This is 0 if
    ||x W_i|| equals its root mean square over random x. The initial standard deviation of AoE's
    scores is `1 / sqrt(2 r)`.

    `scores [T, n]` are logits or norms; `weights` contain `w_router [d, n]` or `w_score [n, d, r]`.
    Where the token or the weights are 0, a cosine is 0 and AoE's score is -1.
    """
    if "w_router" in weights:
        return _by_lengths(scores, ctx.x, activation_norms(weights["w_router"].T))
    lengths = ctx.devices.matrix_norms(weights["w_score"])
    return math.sqrt(ctx.x.shape[1]) * _by_lengths(scores, ctx.x, lengths) - 1


def _by_lengths(scores, x, weight_lengths):
    lengths = activation_norms(x)[:, None] * weight_lengths
    return jnp.where(lengths > 0, scores / jnp.where(lengths > 0, lengths, 1), 0)


@jax.custom_jvp
def straight_through_sign(gap):
    """Returns 1 where `gap` is above 0, 0 where it is 0; the gradient is that of `gap`."""
    return jnp.sign(gap)


straight_through_sign.defjvps(lambda tangent, _, gap: tangent)


def gates(scores, thresholds, temperature):
    """Scores `[T, n]`, thresholds `[n]` -> gates `[T, n]`: 1 where an expert is chosen, else 0."""
    gap = jax.nn.sigmoid(temperature * scores) - jax.nn.sigmoid(temperature * thresholds)
    return straight_through_sign(jax.nn.relu(gap))


def best_where_none(chosen, scores, live):
    """Adds the live expert of highest score to `chosen [T, n]` bool where a token has no expert."""
    best = jnp.argmax(jnp.where(live, scores, -jnp.inf), axis=1)
    alone = best[:, None] == jnp.arange(scores.shape[1])
    return jnp.where(chosen.any(axis=1, keepdims=True), chosen, alone)


def diversity(w_router, live):
    """`||W' W - I||_F` over live experts' normalised columns: `[d, n]`, `[n]` bool -> `[]`."""
    columns = _directions(w_router.T)
    products = jnp.matmul(columns, columns.T, precision=HIGHEST)
    off = jnp.where(live[:, None] & live, products - jnp.eye(live.shape[0]), 0)
    return activation_norms(off.reshape(-1))


def simplicity(w_router):
    """The mean length of all columns: `[d, n]` -> `[]`."""
    return activation_norms(w_router.T).mean()


def updated_pool(live, fired, unclaimed):
    """Returns the experts that are live after an update, and the added ones, both `[L, n]` bool.

    `live [L, n]` bool is before the update; `fired [L, n]` is R_E and `unclaimed [L, d]` is R_S.
    """
    wanted = (unclaimed != 0).any(axis=1, keepdims=True)
    recorded = wanted | (fired > 0).any(axis=1, keepdims=True)
    left = live & ((fired > 0) | ~recorded)
    first_free = jnp.argmin(left, axis=1)[:, None] == jnp.arange(live.shape[1])
    added = wanted & ~left & first_free
    return left | added, added


def w_score_with_added(w_score, live, added, unclaimed):
    """Puts new experts into `w_score [L, n, d, r]` at `added [L, n]`.

    `live [L, n]` is before the update, so it may include removed experts.
    """
    direction = _directions(unclaimed)
    image = _directions(jnp.einsum("ld,lndr->lnr", direction, w_score))
    new = direction[:, None, :, None] * image[:, :, None, :] + NOISE * _directions(w_score, 2)
    live_lengths = jnp.where(live[:, :, None, None], _lengths(w_score, 2), jnp.nan)
    median = jnp.nanmedian(live_lengths, axis=1, keepdims=True)
    return jnp.where(added[:, :, None, None], median * _directions(new, 2), w_score)


def _directions(a, n_axes=1):
    lengths = _lengths(a, n_axes)
    return a / jnp.where(lengths > 0, lengths, 1)


def _lengths(a, n_axes):
    """The norms over the last `n_axes` axes, which stay as axes of size 1."""
    lengths = activation_norms(a.reshape(*a.shape[:-n_axes], -1))
    return jnp.expand_dims(lengths, tuple(range(-n_axes, 0)))


@dataclass(frozen=True)
class DynMoE(Method):
    """The router of DynMoE. `experts.n_experts` is the number of places for experts.
    The parameter `firing_threshold [n]` is G. The state is `live [n]`, `fired [n]` (R_E),
    `unclaimed [d]` (R_S) and `updates []`, the number of steps so far.
    """

    name = "dynmoe"

    temperature: float = setting(1.0, above=0)  # tau
    # Weight of the losses `diversity` and `simplicity`, which exist only for experts.kind="router".
    loss_weight: float = setting(0.01, at_least=0, training_only=True)
    # Number of live experts at the start of training; None: all n.
    initial_experts: int | None = setting(None, above=0, training_only=True)
    period_steps: int = setting(900, above=0, training_only=True)
    idle_steps: int = setting(300, at_least=0, training_only=True)
    record_steps: int = setting(300, at_least=0, training_only=True)  # 0: live experts never change

    def __call__(self, scores, weights, ctx):
        scores = relative_scores(scores, weights, ctx)
        live, is_real = ctx.state["live"] > 0, ctx.token_weights[:, None] > 0
        gate = gates(scores, weights["firing_threshold"], self.temperature)
        gate = jnp.where(live & is_real, gate, 0)
        chosen, records = jax.lax.stop_gradient(gate) > 0, None
        if ctx.training:
            has_none = (is_real & ~chosen.any(axis=1, keepdims=True))[:, 0].astype(scores.dtype)
            x = jax.lax.stop_gradient(ctx.x).astype(scores.dtype)
            left = jnp.einsum("t,td->d", has_none, x, precision=HIGHEST)
            records = {"unclaimed": ctx.devices.total(left)}
        else:
            chosen = best_where_none(chosen, scores, live) & is_real
        chosen = checkpoint_name(chosen, KEPT_ROUTING)
        weight = jnp.where(gate > 0, gate, 1) / jnp.maximum(chosen.sum(axis=1, keepdims=True), 1)
        return by_mask(chosen, weight)._replace(records=records, live=ctx.state["live"])

    def parameters(self, experts):
        return {"firing_threshold": vector("n", zeros_init)}

    def state(self, experts, balance, d):
        n = experts.n_experts
        live = (jnp.arange(n) < (self.initial_experts or n)).astype(jnp.float32)
        zero = jnp.zeros(())
        return {"live": live, "fired": jnp.zeros(n), "unclaimed": jnp.zeros(d), "updates": zero}

    def losses(self, stats, state, weights):
        if "w_router" not in weights:
            return {}
        w_router, live = weights["w_router"], state["live"] > 0
        return {
            "diversity": (self.loss_weight, jax.vmap(diversity)(w_router, live).sum()),
            "simplicity": (self.loss_weight, jax.vmap(simplicity)(w_router).sum()),
        }

    def update(self, config, state, stats, weights):
        # The optimiser's moments of a new expert need no reset: in the last `record_steps` steps no
        # token gave its place a gradient; only its router column got one, from `simplicity`.
        step = state["updates"][0] % self.period_steps - self.idle_steps
        is_recorded = (step >= 0) & (step < self.record_steps)
        is_due = is_recorded & (step == self.record_steps - 1)
        fired = state["fired"] + jnp.where(is_recorded, stats.load, 0)
        unclaimed = state["unclaimed"] + jnp.where(is_recorded, stats.records["unclaimed"], 0)
        live = state["live"] > 0
        new_live, added = updated_pool(live, fired, unclaimed)
        name = next(name for name in ("w_router", "w_gate_down", "w_gate") if name in weights)
        scored = slice(config.experts.score_neurons if name == "w_gate" else None)

        def with_added(thresholds, w):
            if name == "w_router":
                w = jnp.where(added[:, None, :], _directions(unclaimed)[:, :, None], w)
            else:
                new = w_score_with_added(w[..., scored], live, added, unclaimed)
                w = w.at[..., scored].set(new)
            return jnp.where(added, 0, thresholds), w

        old = weights["firing_threshold"], weights[name]
        thresholds, w = jax.lax.cond(is_due, with_added, lambda *same: same, *old)
        new_state = {
            "live": jnp.where(is_due, new_live.astype(jnp.float32), state["live"]),
            "fired": jnp.where(is_due, 0, fired),
            "unclaimed": jnp.where(is_due, 0, unclaimed),
            "updates": state["updates"] + 1,
        }
        return new_state, {"firing_threshold": thresholds, name: w}

    def check(self, config):
        config.balance.refuse_losses("dynmoe balances load by its own means; set it to 0")
        n, recorded = config.experts.n_experts, self.idle_steps + self.record_steps
        if recorded > self.period_steps:
            wanted = f"must be at least idle_steps + record_steps = {recorded}"
            self.refuse("period_steps", wanted)
        if (self.initial_experts or 0) > n:
            wanted = f"must be at most the number of places, experts.n_experts={n}"
            self.refuse("initial_experts", wanted)
        if not config.experts.has_router and self.loss_weight != type(self).loss_weight:
            self.refuse("loss_weight", "is for experts.kind='router'; leave it at its default")
        if config.experts.score != "norm":
            config.experts.refuse("score", "does not fit routing.name='dynmoe'; use 'norm'")
        if config.experts.large_router:
            why = "is not implemented for routing.name='dynmoe', which compares tokens with the "
            config.experts.refuse("large_router", why + "router's columns")
