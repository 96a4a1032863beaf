"""The jitted path against the plain loops of `reference.py`: outputs and gradients, every kind and
every router.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import AoELayer, DenseLayer, RouterLayer
from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.methods.dense import Dense
from aoe_jax.methods.expert_choice import ExpertChoice, expert_capacity
from aoe_jax.methods.top_p import TopP
from aoe_jax.moe import reference
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.load_balance import balance_loss
from aoe_jax.moe.routing import TopK
from tests.arrays import assert_close, assert_finite, normal
from tests.moe.contexts import expert_choice_weights, parameters_of, top_p_weights

TOP_K = TopK()
WEIGHTS = {
    "aoe": ("w_gate_down", "w_gate_up", "w_up", "w_down"),
    "whole": ("w_gate", "w_up", "w_down"),
    "router": ("w_router", "w_gate", "w_up", "w_down"),
}
FORMS = tuple(WEIGHTS)  # "whole" is AoE with whole gates
SCORES = {"norm": reference.l2_norm, "max": lambda c: c.max(axis=-1)}


def make(
    kind,
    n_tokens=29,
    d_model=12,
    dtype="float64",
    seed=0,
    recompute=False,
    balance=None,
    routing=TOP_K,
    **settings,
):
    """A layer with its parameters and tokens, all in `dtype`."""
    settings = {"n_experts": 5, "top_k": 2, "d_ffn": 16, "d_low": 4} | settings
    if kind == "whole":
        kind, settings = "aoe", {"score_neurons": 3} | settings
    layer = ExpertsLayer(
        experts=ExpertsConfig(kind=kind, **settings),
        routing=Dense() if kind == "dense" else routing,
        balance=balance or BalanceConfig(),
        dtype=jnp.dtype(dtype),
        remat="experts" if recompute else "none",
    )
    x = normal(seed, (n_tokens, d_model), dtype)
    return layer, parameters_of(layer, x, seed + 1), x


def reference_weights(layer, p):
    router = layer.routing
    if router.name == "top_k":
        return reference.top_k_weights(p, layer.experts.top_k, router.norm_topk_prob)
    if router.name == "top_p":
        return top_p_weights(p, router.p)
    return expert_choice_weights(p, expert_capacity(*p.shape, router.capacity_factor))


def reference_scores(config, params, x):
    if config.kind == "aoe":
        w_score = (
            params["w_gate_down"]
            if config.score_neurons is None
            else params["w_gate"][:, :, : config.score_neurons]
        )
        return reference.aoe_scores(x, w_score, SCORES[config.score])
    hidden = jax.nn.silu(x @ params["w_router_hidden"]) if config.large_router else x
    return hidden @ params["w_router"]


def reference_experts(config, params, x, weights):
    if config.low_rank:
        return reference.aoe_experts(x, weights, *(params[name] for name in WEIGHTS["aoe"]))
    return reference.router_experts(x, weights, params["w_gate"], params["w_up"], params["w_down"])


def reference_apply(layer, params, x):
    config = layer.experts
    p = reference_scores(config, params, x)
    weights = reference_weights(layer, p)
    y = reference_experts(config, params, x, weights)
    if config.d_shared:
        hidden = jax.nn.silu(x @ params["w_shared_gate"]) * (x @ params["w_shared_up"])
        shared = hidden @ params["w_shared_down"]
        scale = jax.nn.sigmoid(x @ params["w_shared_scale"]) if config.shared_gate else 1.0
        y += scale * shared
    # Eq. 2 and Eq. 8, over the tokens that balance losses use.
    probability = jax.nn.softmax(p[:: layer.balance.aux_stride])
    load = jax.lax.stop_gradient((weights > 0).astype(p.dtype).mean(axis=0))
    aux_loss = config.n_experts * (load * probability.mean(axis=0)).sum()
    return y, aux_loss, -(probability * jnp.log(probability)).sum(axis=1).mean()


def fast_apply(layer, params, x):
    y, stats = layer.apply({"params": params}, x)
    return y, balance_loss(stats.load, stats.mean_probability), stats.confidence_entropy


def assert_agree(layer, params, x):
    """Compares outputs, balance loss, Ent_conf, and gradients of a random projection of them."""
    cotangent = normal(9, x.shape, x.dtype)

    def value_and_gradients(function, params, x):
        value, pull_back = jax.vjp(function, params, x)
        return value, *pull_back(
            (cotangent, 0.7 * jnp.ones_like(value[1]), -0.3 * jnp.ones_like(value[2]))
        )

    # The reference is not jitted: its operations share compiled programs across cases.
    got = jax.jit(partial(value_and_gradients, partial(fast_apply, layer)))(params, x)
    want = value_and_gradients(partial(reference_apply, layer), params, x)
    assert_finite(got)
    assert_close(got, want, 1e-10)


VARIANTS = {
    "chosen": {},
    "over all": {"routing": TopK(norm_topk_prob=False)},
    "top-1": {"top_k": 1},
    "every expert": {"top_k": 5},
    "top-p": {"routing": TopP(0.6)},
    "expert choice": {"routing": ExpertChoice(2.0)},
}


def cases():
    """Yields `(name, kind, settings)`; with "backend" a layer uses the backend of CPUs."""
    for kind in FORMS:
        for name, variant in VARIANTS.items():
            if name in ("top-1", "every expert") and kind != "aoe":
                continue
            blocked = {"backend": True} if name in ("chosen", "top-p") else {}
            yield f"{kind}, {name}", kind, variant
            if blocked and (name == "chosen" or kind == "aoe"):
                yield f"{kind}, {name}, recomputed", kind, {"recompute": True} | variant | blocked
        for n_tokens in (1, 32, 35) if kind == "aoe" else (35,):
            some = {"balance": BalanceConfig(aux_tokens=0.125), "n_tokens": n_tokens}
            yield f"{kind}, {n_tokens} tokens, an eighth in balance losses", kind, some
    for kind in ("aoe", "whole"):
        yield f"{kind}, scoring as published", kind, {"score_gradient": "dense", "backend": True}
        yield f"{kind}, largest activation", kind, {"score": "max"}
        names = ("chosen", "over all", "top-p", "expert choice")
        for name in names if kind == "aoe" else names[:1]:
            yield f"{kind}, {name}, zero tokens", kind, VARIANTS[name] | {"zero_tokens": True}
    published = {"score_gradient": "dense", "balance": BalanceConfig(aux_tokens=0.125)}
    yield "aoe, as published, an eighth in balance losses", "aoe", published | {"n_tokens": 35}
    yield "whole, every neuron scores", "whole", {"score_neurons": 16}
    yield "aoe, shared expert", "aoe", {"d_shared": 7}
    gated = {"d_shared": 7, "shared_gate": True}
    yield "whole, shared expert with a gate", "whole", gated | {"recompute": True}
    yield "router, shared expert with a gate", "router", gated
    yield "router, factorised gate", "router", {"factorised_gate": True}
    yield "router, large", "router", {"large_router": True}


CASES = {name: (kind, settings) for name, kind, settings in cases()}
# The fast tier has every form with the two usual weights, and the special cases.
RARE = ("recomputed", "an eighth", "zero tokens", "top-1", "every expert")
TIERS = [
    pytest.param(name, marks=pytest.mark.slow) if any(word in name for word in RARE) else name
    for name in CASES
]


@pytest.mark.smoke
@pytest.mark.parametrize("case", TIERS)
def test_agrees_with_the_reference_in_float64(x64, request, case):
    """Outputs, losses and gradients; with zero tokens gradients are finite."""
    kind, settings = CASES[case]
    settings = dict(settings)
    if not settings.pop("backend", False):
        request.getfixturevalue("ragged")
    zero_tokens = settings.pop("zero_tokens", False)
    layer, params, x = make(kind, **settings)
    assert_agree(layer, params, x.at[:7].set(0) if zero_tokens else x)


@pytest.mark.parametrize("kind", ["aoe", "whole"])
def test_sparse_scoring_without_balance_losses(x64, ragged, kind):
    """Only chosen norms have a gradient; outputs and gradients are those of Algorithm 2."""
    layer, params, x = make(kind, balance=BalanceConfig(aux_weight=0.0))
    loss = lambda apply, p, x: (apply(layer, p, x)[0] ** 2).sum()  # noqa: E731
    got = jax.jit(jax.grad(partial(loss, fast_apply), (0, 1)))(params, x)
    want = jax.grad(partial(loss, reference_apply), (0, 1))(params, x)
    assert_close(got, want, 1e-10)
    of_balance = jax.jit(jax.grad(lambda p: fast_apply(layer, p, x)[1]))(params)
    assert all((g == 0).all() for g in jax.tree.leaves(of_balance))


@pytest.mark.parametrize("kind", ["aoe", "whole"])
def test_sparse_scoring_keeps_no_cache(kind):
    """The forward pass keeps no array as large as `[T, n, r]` for the backward pass."""
    sizes, width = {}, {"d_low": 8} if kind == "aoe" else {"score_neurons": 8}
    for mode in ("dense", "sparse"):
        layer, params, x = make(
            kind, 64, dtype="float32", n_experts=16, d_ffn=12, score_gradient=mode, **width
        )
        pull_back = jax.eval_shape(
            lambda p, x, layer=layer: jax.vjp(partial(fast_apply, layer), p, x)[1], params, x
        )
        residuals = jax.tree.leaves(pull_back)
        sizes[mode] = {a.shape for a in residuals if a.size >= 64 * 16 * 8}
    assert (64, 16, 8) in sizes["dense"] and not sizes["sparse"]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_selection_bias_chooses_and_does_not_weigh(x64, ragged, kind, norm_topk_prob):
    layer, params, x = make(kind, routing=TopK(norm_topk_prob))
    bias = jnp.array([0.0, -50, 0, 50, 0])
    y, stats = jax.jit(layer.apply)({"params": params}, x, routing_state={"selection_bias": bias})
    assert float(stats.load[3]) == 1 and float(stats.load[1]) == 0
    p = reference_scores(layer.experts, params, x)
    is_chosen = reference.top_k_weights(p + bias, 2) > 0
    weights = jax.nn.softmax(jnp.where(is_chosen, p, -jnp.inf) if norm_topk_prob else p) * is_chosen
    assert_allclose(y, reference_experts(layer.experts, params, x, weights), atol=1e-10)


@pytest.mark.parametrize("kind", FORMS)
def test_ties_go_to_the_lower_expert(x64, ragged, kind):
    layer, params, x = make(kind)
    params = {
        k: jnp.repeat(v[:1], v.shape[0], 0) if k != "w_router" else jnp.ones_like(v)
        for k, v in params.items()
    }
    stats = jax.jit(layer.apply)({"params": params}, x)[1]
    assert_allclose(stats.load, [1, 1, 0, 0, 0], atol=1e-12)
    assert_agree(layer, params, x)


def test_one_expert_is_the_dense_layer(x64):
    """A router MoE of one expert, whose weight is 1, computes what the dense layer does."""
    layer, params, x = make("router", n_experts=1, top_k=1)
    dense = DenseLayer(ExpertsConfig(kind="dense", d_ffn=16), dtype=jnp.float64)
    dense_params = {name: params[name][0] for name in ("w_gate", "w_up", "w_down")}
    got = jax.jit(dense.apply)({"params": dense_params}, x)[0]
    assert_allclose(got, jax.jit(layer.apply)({"params": params}, x)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "d_low"), [(AoELayer, 8), (AoELayer, 96), (RouterLayer, 8), (DenseLayer, 8)]
)
def test_gate_pre_activations_start_with_equal_variance(layer, d_low):
    """On normalised tokens the variance is 1, for AoE, the router MoE and the dense layer."""
    kind = {AoELayer: "aoe", RouterLayer: "router", DenseLayer: "dense"}[layer]
    made = layer(ExpertsConfig(kind=kind, n_experts=8, d_ffn=256, d_low=d_low))
    x = normal(0, (512, 128))
    w = jax.jit(made.init)(jax.random.key(d_low), x)["params"]
    gate = x @ w["w_gate_down"] @ w["w_gate_up"] if kind == "aoe" else x @ w["w_gate"]
    assert abs(float(jnp.var(gate)) - 1) < 0.05


@pytest.mark.parametrize("kind", ["aoe", "router", "dense"])
def test_leading_axes_are_tokens(kind):
    layer, params, x = make(kind, n_tokens=24, dtype="float32")
    apply = jax.jit(layer.apply)
    flat, shaped = (apply({"params": params}, tokens)[0] for tokens in (x, x.reshape(2, 3, 4, -1)))
    assert_array_equal(shaped.reshape(24, -1), flat)
