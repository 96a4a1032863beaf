"""`experts.kind="uoe"`: layers in the style of Union-of-Experts (Wu, Lv et al., "Neurons in
Mixture-of-Experts are Secretly Routers", OpenReview Ksgiup7ZNZ).

The first s neurons of an expert are its routing neurons, which it computes for every token:

    a_i = SiLU(x W_gate_i[:, :s]) * (x W_up_i[:, :s]),   score_i = ||a_i||
    y   = sum over all i of a_i W_down_i[:s]  +  sum over the chosen i of w_i rest_i(x)

rest_i(x) is the output of the other neurons of expert i. The sum of the routing neurons' outputs is
a virtual shared expert. There is no router and no factorised gate; an expert has as many parameters
as a traditional one. The layer is causal.

Only abstracts and reviews of the paper were available. They describe routing neurons, the L2 norm
of their activation (a review mentions SiLU), top-K, the virtual shared expert, and
s = round(f / K), which a review quotes without a definition of K. This project assumes: K is the
number of chosen experts; the activation a_i includes the up projection; chosen experts add only the
outputs of their other neurons, so that no neuron counts twice; the weights w_i are the softmax over
the chosen norms. The reviews say that the load is better balanced without a balance loss.

The forward pass of a token costs `6 d (n s + K (f - s))` FLOPs. For the backward pass 3 n s numbers
per token are stored, or 2 n s with `model.remat="experts"`. On a mesh the routing neurons of a
device process the tokens of all devices along `expert` and `tensor`. The two parts of an expert are
separate parameters, because each is split over `tensor`.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.methods.top_p import TopP
from aoe_jax.moe.layer import apply_experts, rematerialised
from aoe_jax.moe.routing import Method, TopK
from aoe_jax.moe.scoring import Scores, activation_norms, codes_of_all, safe_root
from aoe_jax.moe.swiglu import KEPT_EXPERTS, weighted_product
from aoe_jax.parameters import EXPERTS

SUFFIX = "_route"  # ends the names of the routing neurons' matrices


def routing_neurons(layer, devices, x, weights):
    """The scores and outputs of the routing neurons of all experts.

    `x [T, d]` -> the norms `[T, n]`, float32 at least, and the virtual shared expert's output
    `[T, d]`. `weights` are this device's shards of `w_gate_route` and `w_up_route`, `[n, d, s]`,
    and of `w_down_route [n, s, d]`.
    """
    with jax.named_scope("score"):
        w = layer.gathered(weights, devices)
        x = devices.gather(devices.gather(x, "expert"), "tensor")
        gate, up = (
            checkpoint_name(codes_of_all(x, w[name + SUFFIX]), KEPT_EXPERTS)
            for name in ("w_gate", "w_up")
        )
        shape, n_tokens = gate.shape, x.shape[0]
        flat = gate.reshape(n_tokens, -1), up.reshape(n_tokens, -1)
        hidden = weighted_product(*flat, jnp.ones(n_tokens))
        norms = activation_norms(hidden.reshape(shape))
        if devices.size("tensor") > 1:
            norms = safe_root(devices.sum_scatter(norms**2, "tensor"))
        scores = devices.exchange(norms, split=0, concatenate=1)
    with jax.named_scope("experts"):
        w_down = w["w_down" + SUFFIX]
        y = hidden @ w_down.reshape(-1, w_down.shape[-1])
        return scores, devices.sum_scatter(devices.sum_scatter(y, "tensor"), "expert")


@dataclass(frozen=True)
class UoE(Method):
    """Scores each expert by the norm of its routing neurons' activations, `a_i`."""

    name = "uoe"

    # s, the number of routing neurons of an expert; None: round(experts.d_ffn / experts.top_k).
    routing_neurons: int | None = None
    p: float | None = setting(None, above=0, below=1)  # p of top-p routing; None: top-k routing
    norm_topk_prob: bool = True  # weights are a softmax over the chosen scores; False: over all

    @property
    def router(self):
        """The router that chooses experts by their scores."""
        return TopK(self.norm_topk_prob) if self.p is None else TopP(self.p)

    def __call__(self, x, weights, layer, ctx):
        routing_weights = {name: w for name, w in weights.items() if name.endswith(SUFFIX)}
        neurons = partial(routing_neurons, layer, ctx.devices)
        norms, shared = rematerialised(neurons, ctx.devices)(x, routing_weights)
        scores = Scores.of(norms, layer.balance.aux_stride)
        with jax.named_scope("route"):
            routing = self.router(scores.values, weights, ctx)
        with jax.named_scope("balance"):
            stats = layer.statistics(scores, routing, weights, ctx)
        return apply_experts(x, routing, weights, layer, ctx) + shared, stats

    def choice(self, experts):
        return self.router.choice(experts)

    def neurons(self, experts):
        """s, the number of routing neurons of an expert."""
        if self.routing_neurons is None:
            return round(experts.d_ffn / experts.top_k)
        return self.routing_neurons

    def parameters(self, experts):
        s = self.neurons(experts)
        # Both parts are initialised as slices of one matrix, so W_down's fan-in is the whole width.
        down_init = initializers.normal(experts.d_ffn**-0.5)
        found = {}
        for suffix, size, per_expert in ((SUFFIX, s, False), ("", experts.d_ffn - s, True)):
            for name in ("w_gate", "w_up", "w_down"):
                whole = EXPERTS[name]
                found[name + suffix] = dataclasses.replace(
                    whole,
                    axes=whole.axes.replace("f", str(size)),
                    init=down_init if name == "w_down" else whole.init,
                    per_expert=per_expert,
                )
        return found

    def state(self, experts, balance, d):
        return self.router.state(experts, balance, d)

    def update(self, config, state, stats, weights):
        return self.router.update(config, state, stats, weights)

    def check(self, config):
        e, s = config.experts, self.neurons(config.experts)
        if not 0 < s < e.d_ffn:
            wanted = f"must be at least 1 and below experts.d_ffn={e.d_ffn}"
            if self.routing_neurons is None:
                wanted = f"comes to {s} for experts.top_k={e.top_k}; it {wanted}"
            self.refuse("routing_neurons", wanted)
        if s % config.mesh.tensor:
            config.mesh.refuse("tensor", f"must divide routing_neurons={s}")
        if self.p is not None and not self.norm_topk_prob:
            self.refuse("norm_topk_prob", f"routing.p={self.p} is top-p routing; leave it at True")
