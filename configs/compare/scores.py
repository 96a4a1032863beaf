"""Scores that the leaderboard tries, as routers in a file of one's own:
`--config.routing.name=configs/compare/scores.py:MPI`.

All take the K experts of highest score `s[t, i]`; weights are the softmax of the chosen scores,
except where a class says otherwise. `x` are the tokens that the experts get, after the norm.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import FixedK, Hooks, best_experts, by_token, top_k
from aoe_jax.parameters import vector


class _Scored(FixedK):
    """The base of routers that take the K highest scores."""

    def __call__(self, scores, weights, ctx):
        return top_k(scores, ctx.top_k, bias=ctx.state.get("selection_bias"))


def _mpi(method, x, weights, ctx):
    gate = weights["w_gate"]
    rows = weights["w_router"].T if "w_router" in weights else gate[:, :, 0]
    moved = jnp.einsum("nf,ndf->nd", jnp.einsum("nd,ndf->nf", rows, gate), gate)
    unit = moved / jnp.maximum(jnp.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    return x.astype(moved.dtype) @ (method.norm * unit).T


@dataclass(frozen=True)
class MPI(_Scored):
    """Manifold Power Iteration (arXiv 2606.12397): a router row r is moved towards the principal
    direction of its expert's gate W, and gets the norm C.

        s[t, i] = C x[t] . u / |u|,  u = r_i W_i W_i^T

    AoE has no router, and r is the first column of the expert's own gate: then s is a signed
    reading of the expert's own activations at the cost of a router.
    """

    hooks = Hooks(scores=_mpi)

    norm: float = setting(2.0, above=0)  # C; the rows of a new router have norms near 1

    def flops(self, config):
        return 6.0 * config.model.d_model * config.experts.n_experts  # of x . u; u is of no token

    def check(self, config):
        experts, mesh = config.experts, config.mesh
        if experts.low_rank or experts.large_router:
            self.refuse("name", "needs whole gates: experts.kind='router', or score_neurons")
        if max(mesh.fsdp, mesh.expert, mesh.tensor) > 1:
            self.refuse("name", "is not implemented on meshes that split experts")


def _first_coordinates(method, x, weights, ctx):
    n_experts = len(weights["w_up"]) * ctx.devices.size("expert")
    return x[:, :n_experts].astype(jnp.promote_types(x.dtype, jnp.float32))


@dataclass(frozen=True)
class SelfRouting(_Scored):
    """Self-Routing (arXiv 2604.00421): `s[t, i] = x[t, i]`. There is no router; attention and
    earlier layers must write the scores into the first n coordinates.
    """

    hooks = Hooks(scores=_first_coordinates)

    def flops(self, config):
        return 0.0

    def check(self, config):
        if config.experts.n_experts > config.model.d_model:
            self.refuse("name", "needs a coordinate for each expert; raise model.d_model")


@dataclass(frozen=True)
class Centred(FixedK):
    """Scores minus their running means over the tokens of earlier batches: `s[t, i] - m[i]`.

    m has no gradient. Norms have a large common offset, and an expert whose weights grow has larger
    norms for all tokens; both cancel.
    """

    decay: float = setting(0.99, at_least=0, below=1, training_only=True)

    def __call__(self, scores, weights, ctx):
        routing = top_k(scores - ctx.state["mean"], ctx.top_k)
        if not ctx.training:
            return routing
        count = ctx.token_weights[:, None]
        sums = (jax.lax.stop_gradient(scores) * count).sum(axis=0), count.sum()
        total, n_tokens = ctx.devices.total(sums)
        return routing._replace(records={"mean": total / jnp.maximum(n_tokens, 1)})

    def state(self, experts, balance, d):
        return {"mean": jnp.zeros(experts.n_experts)}

    def update(self, config, state, stats, weights):
        mean = self.decay * state["mean"] + (1 - self.decay) * stats.records["mean"]
        return {"mean": mean}, {}


@dataclass(frozen=True)
class Tempered(FixedK):
    """Weights are the softmax of `s / temperature` over the chosen experts; balance losses use the
    scores `s`. The method is this project's.
    """

    temperature: float = setting(0.5, above=0)

    def __call__(self, scores, weights, ctx):
        expert = best_experts(scores, ctx.top_k, ctx.state.get("selection_bias"))
        chosen = jnp.take_along_axis(scores, expert, axis=1)
        return by_token(expert, jax.nn.softmax(chosen / self.temperature))


def _hashes(method, x, weights, ctx):
    """Uniform random numbers that the token's id and the layer determine."""
    if ctx.token_ids is None:
        raise ValueError("routing by hash needs token ids, which only aoe_jax.Decoder passes")
    n_experts = len(weights["w_up"]) * ctx.devices.size("expert")
    of_layer = jax.random.fold_in(jax.random.key(0), ctx.layer_index)
    draw = lambda token: jax.random.uniform(jax.random.fold_in(of_layer, token), (n_experts,))  # noqa: E731
    return jax.vmap(draw)(ctx.token_ids)


@dataclass(frozen=True)
class Hash(FixedK):
    """Hash layers (arXiv 2106.04426): each token of the vocabulary has K fixed random experts in
    each layer, all with weight 1 / K; only a loss-free bias changes them. The router is never used.
    """

    hooks = Hooks(scores=_hashes)

    def flops(self, config):
        return 0.0

    def __call__(self, scores, weights, ctx):
        expert = best_experts(scores, ctx.top_k, ctx.state.get("selection_bias"))
        return by_token(expert, jnp.full(expert.shape, 1 / ctx.top_k, scores.dtype))


@dataclass(frozen=True)
class HashChoice(FixedK):
    """The experts of `Hash`, weighted by the softmax of their scores, logits or norms."""

    norm_topk_prob = True

    def __call__(self, scores, weights, ctx):
        hashes = _hashes(self, None, weights, ctx)
        expert = best_experts(hashes, ctx.top_k, ctx.state.get("selection_bias"))
        return by_token(expert, jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1)))


@dataclass(frozen=True)
class DefaultVectors(FixedK):
    """Default MoE (arXiv 2504.12463) with learned vectors v_i: an expert that is not chosen adds
    its weight times v_i, so that every score has a gradient. Weights are the softmax over all n.
    """

    def __call__(self, scores, weights, ctx):
        routing = top_k(scores, ctx.top_k, False, ctx.state.get("selection_bias"))
        expert = routing.expert.reshape(-1, ctx.top_k)
        others = jax.nn.softmax(scores).at[jnp.arange(len(expert))[:, None], expert].set(0)
        return routing._replace(added=others @ weights["w_default"])

    def parameters(self, experts):
        return {"w_default": vector("n d", jax.nn.initializers.zeros)}
