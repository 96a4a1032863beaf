"""Union-of-Experts-style layers (after Wu, Lv et al., "Neurons in Mixture-of-Experts are Secretly
Routers").

The first N_s neurons of every expert are its routing neurons. All experts compute theirs for every
token:

    a_i = SiLU(x Wg_i[:, :N_s]) * (x Wp_i[:, :N_s]),   s_i = ||a_i||,   y = sum over all i of a_i Wo_i[:N_s]
                                                                    + sum over the chosen i of w_i (the rest of expert i)

The norms s_i are the scores by which experts are chosen and weighed. What the routing neurons
compute isn't lost: the sum of their outputs is a virtual shared expert. There is no router and no
factorised gate; an expert has the parameters of a traditional one. Causal: a token knows of no
other one.

"-style", for only abstracts and reviews of the paper were at hand (OpenReview Ksgiup7ZNZ). From
these: routing neurons, the L2 norm of their activation (a review speaks of SiLU in it), top-K, the
virtual shared expert, and N_s = round(D / K), quoted in a review that doesn't say what K is. This
project's reading: K is the number of chosen experts, so that `uoe.routing_neurons=None` is
round(d_ffn / top_k); the activation is that of the whole SwiGLU, the product above; in the weighted
sum the chosen experts add the rest of their neurons only, so that no neuron counts twice; weights
are those of the selection, for top-K the softmax over the chosen norms. No balance loss is needed
for it to run; the reviews say that balance is better without.

A token costs `6 d (n N_s + K (D - N_s))` FLOPs forward: with N_s = D / K the routing neurons alone
are n / K experts. Kept for the backward pass are 3 n N_s numbers a token, or 2 n N_s with
`model.remat="experts"`. On a mesh the routing neurons of a device's experts see the tokens of all
devices along `expert` and `tensor`, whatever `mesh.transport` is; the rest is dispatched as in
other layers. Over `tensor` both parts are split, so both widths must be divisible by it; hence they
are parameters of their own.

t tokens of a device, T of those it shares experts with, d model width, n experts, m of a device,
N_s routing neurons, D expert width.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts import scoring
from aoe_jax.experts.layer import ExpertsModule, expert_init, whole_gate
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, weighted_product

ROUTING = ("w_g_route", "w_p_route", "w_o_route")


def routing_neurons(devices, dtype, x, weights):
    """What the routing neurons of all experts compute.

    Args:
      devices: `parallel.Devices`.
      dtype: of computation.
      x: `[t, d]`.
      weights: `w_g_route`, `w_p_route` `[m, d, N_s]` and `w_o_route` `[m, N_s, d]`, float32, pieces
        as parameters lie.

    Returns:
      `(scores, y)`: the norms `[t, n]`, float32 at least, and the output of the virtual shared
        expert `[t, d]`.
    """
    with jax.named_scope("score"):
        w_g, w_p, w_o = (devices.gather_weight(name, weights[name], dtype) for name in ROUTING)
        x = devices.gather(devices.gather(x, "expert"), "tensor")
        gate, up = (
            checkpoint_name(scoring.low_rank_activations(x, w), EXPERT_RESIDUAL) for w in (w_g, w_p)
        )
        shape, n_tokens = gate.shape, x.shape[0]
        of_all = weighted_product(
            gate.reshape(n_tokens, -1), up.reshape(n_tokens, -1), jnp.ones(n_tokens)
        )
        norms = scoring.activation_norms(of_all.reshape(shape))  # [T, m]
        if devices.size("tensor") > 1:
            norms = scoring.safe_root(devices.sum_scatter(norms**2, "tensor"))
        scores = devices.exchange(norms, split=0, concatenate=1)
    with jax.named_scope("experts"):
        y = of_all @ w_o.reshape(-1, w_o.shape[-1])
        return scores, devices.sum_scatter(devices.sum_scatter(y, "tensor"), "expert")


class UoELayer(ExpertsModule):
    """`experts.kind="uoe"`; its settings are `methods.UoEConfig` with `routing_neurons` filled in."""

    score_name = "mean_norm"
    routing_note = "Of UoE-style experts the oracle has those neurons that don't route."
    for_all_tokens = ROUTING

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        n, width, routing = self.config.n_experts, self.config.d_ffn, self.settings.routing_neurons
        # Drawn as in one matrix of all neurons, whose fan-in is the whole width.
        out_init = nn.initializers.normal(width**-0.5)
        found = {}
        for suffix, size in (("_route", routing), ("", width - routing)):
            found |= {f"{name}{suffix}": (expert_init, (n, d, size)) for name in ("w_g", "w_p")}
            found[f"w_o{suffix}"] = out_init, (n, size, d)
        return found

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""
        routing = {name: weights[name] for name in ROUTING}
        rest = {name: w for name, w in weights.items() if name not in ROUTING}
        scores, shared = self.rematerialised(
            devices, partial(routing_neurons, devices, self.dtype)
        )(x, routing)
        balance_scores = scores[:: self.balance.aux_stride]
        y, stats, per_token = self.pipeline(
            devices, x, given, scores, balance_scores, whole_gate, rest
        )
        return y + shared, stats, per_token
