"""SMEAR (Muqeeth, Liu and Raffel, arXiv 2306.03745): experts are merged, and one merged expert
processes a whole sequence.

    v = mean of the sequence's tokens;   p = softmax(scores(v));   Theta = sum_i p_i Theta_i, for every matrix of the experts

Nothing is chosen: all is differentiable, every expert has a gradient, and there is no balance loss.
In training each p_i is dropped with the probability `smear.expert_dropout`, and the rest normalised
again.

Scores are the authors' router: LayerNorm(v) by the router's weights, normalised by a LayerNorm over
d for each expert whose gain starts at 0.01, so that p starts nearly uniform. (The bias of the
second norm would add the same to all experts, and is left out.) With `experts.factorised_gate`
experts are AoE's, and scores are the norms of their low-rank activations of the mean token, ||v
Wdown_i||: this project's reading for AoE.

In a decoder the mean over a whole sequence would know the future. There sequences fall into
segments of `smear.segment` tokens, and the expert of a segment is merged by the mean of the segment
BEFORE it, as in Lory (Zhong et al., arXiv 2405.03133): causal, in training and at inference. The
first segment has uniform weights, this project's choice. With `segment=0` the mean is that of the
sequence itself, for classifiers and encoders: a layer can, a decoder is refused.

Averages of matrices are no averages of functions: (Wdown, Wup) and (Wdown Q, Q^T Wup) are one
expert, and merge otherwise with others. So that averages mean something, all experts start near
one: a share `smear.own_share` of the variance of their matrices is each one's own, the rest common
to all (the authors' code can start from equal experts; 1 is independent ones).

Costs, beside one expert a token, 2 n |expert| FLOPs a segment for merging, n / segment of the
expert's own, and memory for one merged expert a segment, which the backward pass keeps but for
`model.remat` experts and layer.

B sequences, J segments of a sequence, G tokens of a segment, S positions, d model width, n experts,
r low rank.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.methods import SmearConfig
from aoe_jax.experts import scoring
from aoe_jax.experts.balance import LayerStats
from aoe_jax.experts.layer import ExpertsModule, expert_init, expert_shapes
from aoe_jax.experts.swiglu import EXPERT_RESIDUAL, one_expert

ROUTER_SCALE = 0.01  # of the router's weights at the beginning, and of the gain of their norm
NORM_EPS = 1e-5
DROPPED = 1e-10  # what is left of each probability, so that a sequence that drops all experts has uniform weights

# The authors' router: name -> initializer, axes.
_ROUTER = {
    "w_router": (nn.initializers.normal(ROUTER_SCALE), "dn"),
    "pooled_scale": (nn.initializers.ones_init(), "d"),
    "pooled_bias": (nn.initializers.zeros_init(), "d"),
    "router_scale": (nn.initializers.constant(ROUTER_SCALE), "d"),
    "expert_bias": (nn.initializers.zeros_init(), "n"),
}


def cut_segments(a, size):
    """`[B, S, ...]` -> `[B, J, size, ...]`, filled up with zeros at the end."""
    padded = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), *((0, 0) for _ in a.shape[2:])))
    return padded.reshape(a.shape[0], -1, size, *a.shape[2:])


def mean_tokens(segments, token_weights):
    """Means over the tokens that count: `[..., G, d]`, `[..., G]` -> `[..., d]`, float32 at least;
    0 where none counts.
    """
    segments, token_weights = _wide(segments), _wide(token_weights)
    total = jnp.einsum(
        "...gd,...g->...d", segments, token_weights, precision=jax.lax.Precision.HIGHEST
    )
    return total / jnp.maximum(token_weights.sum(axis=-1), 1)[..., None]


def router_scores(v, router):
    """The authors' router: mean tokens `v [..., d]` -> `[..., n]`, float32 at least; `router` as in
    `SmearLayer.weights`.
    """
    normed = _normalised(v, axis=-1) * router["pooled_scale"] + router["pooled_bias"]
    columns = _normalised(router["w_router"], axis=0) * router["router_scale"][:, None]
    return jnp.matmul(normed, columns, precision=jax.lax.Precision.HIGHEST) + router["expert_bias"]


def _wide(a):
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _normalised(a, axis):
    a = _wide(a)
    return (a - a.mean(axis, keepdims=True)) * jax.lax.rsqrt(a.var(axis, keepdims=True) + NORM_EPS)


def merging_weights(scores, causal):
    """`scores [B, J, n]` -> `p [B, J, n]`; where `causal` by the scores of the segment before,
    uniform for the first.
    """
    if causal:
        scores = jnp.pad(scores, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jax.nn.softmax(scores)


def drop_experts(p, kept):
    """`p [..., n]` without the experts that `kept [..., n]` bool leaves out, normalised again."""
    p = p * kept + DROPPED
    return p / p.sum(axis=-1, keepdims=True)


def merge(p, weights):
    """The merged experts: `p [..., n]`, and by name matrices `[n, a, b]` -> `[..., a, b]` of the
    same dtype.
    """
    return {
        name: jnp.einsum("...n,nab->...ab", p.astype(w.dtype), w) for name, w in weights.items()
    }


def merged_experts(x, p, weights):
    """Each sequence (or segment) by an expert of its own: `x [..., T, d]`, `p [..., n]`, `weights`
    as in `merge`.
    """
    return one_expert(x, merge(p, weights))


def merging_stats(scores, p, counts, total):
    """Statistics of a layer, weighed by tokens: an expert's load is its mean share in the merged
    ones.

    `scores` and `p` `[B, J, n]`, `counts [B, J]` tokens of the segments; `total` adds those of
    other devices.
    """
    scores, p = jax.lax.stop_gradient((scores, p))
    entropy = jax.scipy.special.entr(p).sum(axis=-1)

    def token_sum(values):
        return jnp.einsum("bj,bj...->...", counts, values, precision=jax.lax.Precision.HIGHEST)

    count, *sums = total(
        (counts.sum(), *map(token_sum, (p, entropy, scores, jnp.std(scores, axis=-1))))
    )
    load, entropy, mean_score, spread = (value / jnp.maximum(count, 1) for value in sums)
    return LayerStats(load, load, entropy, mean_score, spread)


def near_copies(own_share):
    """An initializer of the variance of `expert_init`, of which a share is each expert's own and
    the rest common to all.
    """

    def init(key, shape, dtype=jnp.float32):
        common_key, own_key = jax.random.split(key)
        common, own = (
            expert_init(common_key, (1, *shape[1:]), dtype),
            expert_init(own_key, shape, dtype),
        )
        return (
            np.sqrt(1 - own_share).astype(dtype) * common + np.sqrt(own_share).astype(dtype) * own
        )

    return init


class SmearLayer(ExpertsModule):
    """`experts.kind="smear"`; `settings` is a `SmearConfig`. A sequence is the tokens along the
    axis before the last.
    """

    selects = False
    needs_key = True
    gathers_experts = True
    score_name = "mean_score"  # of a router, or norms
    for_all_tokens = tuple(_ROUTER)
    not_by_token = "the expert of a segment is merged by the mean of the segment before it, which no cache of a text keeps"

    @classmethod
    def flops_beside_experts(cls, config, shared):
        """Merging and scoring, once a segment."""
        c, d = config.experts, config.model.d_model
        matrices = sum(math.prod(shape) for shape in expert_shapes(c, d).values())
        score = c.n_experts * d * (c.d_low if c.low_rank else 1)
        return round(2 * (matrices + score) / config.smear.segment)

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        c, init = self.config, near_copies(self._settings.own_share)
        experts = {name: (init, shape) for name, shape in expert_shapes(c, d).items()}
        sizes = {"d": d, "n": c.n_experts}
        router = {
            name: (init, tuple(sizes[axis] for axis in axes))
            for name, (init, axes) in _ROUTER.items()
        }
        return experts if c.low_rank else router | experts

    @property
    def _settings(self):
        return self.settings or SmearConfig()

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, None)`.

        Raises:
          ValueError: tokens `[T, d]` on a mesh, where no device has a whole sequence.
        """
        whole, causal = devices.whole_sequences, self._settings.segment > 0
        token_weights = whole(given.token_weights)
        n_sequences, n_positions = token_weights.shape
        size = min(self._settings.segment or n_positions, n_positions)
        token_weights = cut_segments(token_weights, size)
        kept = self._kept(devices, given.key, token_weights.shape[:2])

        def experts(x, weights):
            with jax.named_scope("experts"):
                of_experts = expert_shapes(self.config, x.shape[-1])
                w = {
                    name: devices.gather_experts(name, weights[name], self.dtype)
                    for name in of_experts
                }
            with jax.named_scope("dispatch"):
                segments = cut_segments(whole(x), size)
            with jax.named_scope("score"):
                v = mean_tokens(segments, token_weights)
                if self.config.low_rank:
                    flat = v.reshape(-1, v.shape[-1]).astype(self.dtype)
                    scores = scoring.norms(flat, w["w_down"]).reshape(*v.shape[:-1], -1)
                else:
                    scores = router_scores(v, weights)
                scores = checkpoint_name(scores, EXPERT_RESIDUAL)
                p = merging_weights(scores, causal)
                p = p if kept is None else drop_experts(p, kept)
            with jax.named_scope("experts"):
                y = merged_experts(segments, p, w)
            with jax.named_scope("combine"):
                y = y.reshape(n_sequences, -1, y.shape[-1])[:, :n_positions]
                return devices.sum_scatter(y, "tensor", 1).reshape(x.shape), scores, p

        y, scores, p = self.rematerialised(devices, experts)(x, weights)
        return y, merging_stats(scores, p, token_weights.sum(axis=-1), devices.total), None

    def _kept(self, devices, key, shape):
        """Which experts are kept for each segment of this device, `[B, J, n]`; None: all."""
        if key is None:
            return None
        n_sequences, n_segments = shape
        shape = (n_sequences * devices.batch_pieces, n_segments, self.config.n_experts)
        return devices.own_sequences(
            jax.random.bernoulli(key, 1 - self._settings.expert_dropout, shape)
        )
