"""`experts.kind="smear"`: SMEAR (Muqeeth, Liu and Raffel, arXiv 2306.03745). Experts are merged,
and one merged expert processes a whole sequence.

    v = mean of the sequence's tokens;   p = softmax(scores(v))
    W = sum_i p_i W_i, for every matrix

Every expert has a gradient, and there is no balance loss. In training each p_i is set to 0 with the
probability `expert_dropout`, and the others are divided by their sum.

Scores are those of the authors' router: LayerNorm(v) times the router's weights, plus a bias. A
second LayerNorm, over d, normalises the weights of each expert; its gain starts at 0.01, so p
starts nearly uniform. (It needs no bias: a bias would add the same number to all scores.) With
`experts.factorised_gate` the experts are AoE's, and scores are the norms ||v W_gate_down_i||; this
variant for AoE is this project's addition.

In a decoder the mean over a whole sequence would depend on later tokens. So sequences are cut into
J segments of `segment` tokens, and the mean of the PREVIOUS segment determines p (Lory, Zhong et
al., arXiv 2405.03133). This is causal in training and at inference. In the first segment p is
uniform, which is this project's choice. With `segment=0` v is the mean of the whole sequence, for
classifiers and encoders; a decoder refuses this value.

The output of a merged expert is not the mean of the experts' outputs: (W_gate_down, W_gate_up) and
(W_gate_down Q, Q^T W_gate_up) are the same expert if Q is orthogonal, but merge differently with
others. So initial experts are similar: a fraction `own_share` of the variance of their matrices is
their own, the rest is common. (1 makes them independent; the authors' code can make them equal.)

Merging costs 2 n |expert| FLOPs per segment; |expert| is the number of parameters of an expert.
Unless `model.remat` is experts or layer, it also needs memory for one merged expert per segment.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.methods.unchosen import Unchosen
from aoe_jax.moe.layer import rematerialised
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.moe.routing import Causality
from aoe_jax.moe.scoring import scores_of_all
from aoe_jax.moe.swiglu import KEPT_EXPERTS, single_expert
from aoe_jax.parameters import Parameter, expert_init, matrices_of, ones_init, vector, zeros_init

ROUTER_SCALE = 0.01  # initial standard deviation of w_router, and initial gain of its LayerNorm
NORM_EPS = 1e-5
DROPPED = 1e-10  # added to each p_i, so that p is uniform if all experts are dropped
HIGHEST = jax.lax.Precision.HIGHEST

ROUTER = {
    "w_router": Parameter("d n", (None, None), initializers.normal(ROUTER_SCALE), decays=True),
    "pooled_scale": vector("d", ones_init),
    "pooled_bias": vector("d", zeros_init),
    "router_scale": vector("d", initializers.constant(ROUTER_SCALE)),
    "expert_bias": vector("n", zeros_init),
}


def cut_segments(a, size):
    """Cuts `[B, S, ...]` into segments `[B, J, size, ...]`; zeros fill the last segment."""
    padded = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), *((0, 0) for _ in a.shape[2:])))
    return padded.reshape(a.shape[0], -1, size, *a.shape[2:])


def mean_tokens(segments, token_weights):
    """Means over real tokens, 0 if there are none: `[..., S, d]`, `[..., S]` -> `[..., d]`."""
    segments, token_weights = _wide(segments), _wide(token_weights)
    total = jnp.einsum("...gd,...g->...d", segments, token_weights, precision=HIGHEST)
    return total / jnp.maximum(token_weights.sum(axis=-1), 1)[..., None]


def router_scores(v, router):
    """Scores of the authors' router: mean tokens `v [..., d]` -> `[..., n]`, float32 at least."""
    normed = _normalised(v, axis=-1) * router["pooled_scale"] + router["pooled_bias"]
    columns = _normalised(router["w_router"], axis=0) * router["router_scale"][:, None]
    return jnp.matmul(normed, columns, precision=HIGHEST) + router["expert_bias"]


def _wide(a):
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _normalised(a, axis):
    a = _wide(a)
    return (a - a.mean(axis, keepdims=True)) * jax.lax.rsqrt(a.var(axis, keepdims=True) + NORM_EPS)


def drop_experts(p, kept):
    """Sets `p [..., n]` to 0 where `kept [..., n]` bool is false, and divides p by its sum."""
    p = p * kept + DROPPED
    return p / p.sum(axis=-1, keepdims=True)


def merging_stats(scores, p, counts, total):
    """Returns the statistics of a layer; an expert's load is the mean over tokens of its p.

    `scores` and `p` are `[B, J, n]`, and `counts [B, J]` are the numbers of real tokens.
    """
    scores, p = jax.lax.stop_gradient((scores, p))
    entropy = jax.scipy.special.entr(p).sum(axis=-1)

    def token_sum(values):
        return jnp.einsum("bj,bj...->...", counts, values, precision=HIGHEST)

    sums = [token_sum(a) for a in (p, entropy, scores, jnp.std(scores, axis=-1))]
    count, *sums = total((counts.sum(), *sums))
    load, entropy, mean_score, spread = (value / jnp.maximum(count, 1) for value in sums)
    return LayerStats(load, load, entropy, mean_score, spread)


def near_copies(own_share):
    """An initialiser like `expert_init`; `own_share` of the variance differs between experts."""

    def init(key, shape, dtype=jnp.float32):
        common_key, own_key = jax.random.split(key)
        common = expert_init(common_key, (1, *shape[1:]), dtype)
        own = expert_init(own_key, shape, dtype)
        weights = np.sqrt(1 - own_share).astype(dtype), np.sqrt(own_share).astype(dtype)
        return weights[0] * common + weights[1] * own

    return init


@dataclass(frozen=True)
class Smear(Unchosen):
    """The SMEAR layer. The second to last axis of its input is the sequence."""

    name = "smear"

    # Number of tokens of a segment. They use one merged expert, with p from the previous segment.
    # 0: a whole sequence uses one merged expert, with p from the mean of this sequence.
    segment: int = setting(64, at_least=0)
    # Probability in training that an expert is left out of a merged expert.
    expert_dropout: float = setting(0.1, at_least=0, below=1, training_only=True)
    # Share of each expert's own part in the variance of initial matrices; the rest is common.
    own_share: float = setting(0.5, above=0, at_most=1, training_only=True)

    def __call__(self, x, weights, layer, ctx):
        devices = ctx.devices
        token_weights = devices.whole_sequences(ctx.token_weights)
        n_sequences, n_positions = token_weights.shape
        size = min(self.segment or n_positions, n_positions)
        token_weights = cut_segments(token_weights, size)
        kept = self._kept(ctx, token_weights.shape[:2], layer.experts.n_experts)
        declared = layer.parameters

        def compute(x, weights):
            with jax.named_scope("experts"):
                w = {
                    name: devices.gather_experts(declared[name], a, layer.dtype)
                    for name, a in weights.items()
                    if declared[name].per_expert
                }
            with jax.named_scope("dispatch"):
                segments = cut_segments(devices.whole_sequences(x), size)
            with jax.named_scope("score"):
                v = mean_tokens(segments, token_weights)
                if "w_gate_down" in w:
                    flat = v.reshape(-1, v.shape[-1]).astype(layer.dtype)
                    scores = scores_of_all(flat, w["w_gate_down"]).reshape(*v.shape[:-1], -1)
                else:
                    scores = router_scores(v, weights)
                scores = checkpoint_name(scores, KEPT_EXPERTS)
                before = jnp.pad(scores, ((0, 0), (1, 0), (0, 0)))[:, :-1]
                p = jax.nn.softmax(before if self.segment else scores)
                p = p if kept is None else drop_experts(p, kept)
            with jax.named_scope("experts"):
                p_cast = p.astype(layer.dtype)
                merged = {name: jnp.einsum("bjn,nac->bjac", p_cast, a) for name, a in w.items()}
                y = single_expert(segments, merged)
            with jax.named_scope("combine"):
                y = y.reshape(n_sequences, -1, y.shape[-1])[:, :n_positions]
                return devices.sum_scatter(y, "tensor", 1).reshape(x.shape), scores, p

        run = rematerialised(compute, devices, gathers_experts=True)
        y, scores, p = run(x, weights)
        return y, merging_stats(scores, p, token_weights.sum(axis=-1), devices.total)

    def _kept(self, ctx, shape, n_experts):
        """The experts that this device's segments keep, `[B, J, n]` bool; None: all experts."""
        if not ctx.training:
            return None
        n_sequences, n_segments = shape
        shape = (n_sequences * ctx.devices.batch_pieces, n_segments, n_experts)
        kept = jax.random.bernoulli(ctx.key(), 1 - self.expert_dropout, shape)
        return ctx.devices.own_sequences(kept)

    def causality(self, experts):
        return Causality(
            reason="" if self.segment else "experts are merged by the mean of the whole sequence",
            no_decoding="the merged expert of a segment depends on the mean of the segment before "
            "it, which the cache of decoding does not contain",
        )

    def parameters(self, experts):
        init = near_copies(self.own_share)
        matrices = {
            name: dataclasses.replace(matrix, init=init)
            for name, matrix in matrices_of(experts).items()
        }
        return matrices if experts.low_rank else ROUTER | matrices

    def flops(self, config):
        e, d = config.experts, config.model.d_model
        sizes, declared = e.sizes(d), self.parameters(e).values()
        merging = sum(math.prod(p.shape(sizes)) for p in declared if p.per_expert)
        scoring = e.n_experts * d * (e.d_low if e.low_rank else 1)
        return 3 * round(2 * (merging + scoring) / self.segment)

    def check(self, config):
        super().check(config)
        length = config.data.seq_len
        if self.segment < 2:
            why = "0 would merge by the mean of a whole sequence, which depends on later tokens"
            self.refuse("segment", f"must be at least 2 in a decoder: {why}")
        if self.segment >= length:
            why = "the first segment determines p of the second"
            self.refuse("segment", f"must be below data.seq_len={length}: {why}")
        if config.data.document_mask:
            wanted = "is not implemented for experts.kind='smear'"
            config.data.refuse("document_mask", f"{wanted}: a segment may contain two documents")
