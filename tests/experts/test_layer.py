"""The jitted path against the plain loops of `reference.py`: outputs and gradients, every kind and every selection."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax import AoELayer, DenseLayer, RouterLayer
from aoe_jax.config import ExpertsConfig
from aoe_jax.experts import reference, selection
from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.layer import LAYERS

pytestmark = pytest.mark.smoke

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-2}
WEIGHTS = {"aoe": ("w_down", "w_up", "w_p", "w_o"), "router": ("w_router", "w_g", "w_p", "w_o")}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make(kind, n_tokens=29, d_model=12, dtype="float64", seed=0, **settings):
    """A layer with its parameters and tokens, all in `dtype`."""
    settings = {"n_experts": 5, "top_k": 2, "d_ffn": 16, "d_low": 4} | settings
    config = ExpertsConfig(kind=kind, **settings)
    layer = LAYERS[kind](config, jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(seed), (n_tokens, d_model), dtype)
    params = jax.jit(layer.init)(jax.random.key(seed + 1), x)["params"]
    return layer, jax.tree.map(lambda a: a.astype(dtype), params), x


def reference_weights(config, p):
    if config.selection == "top_k":
        return reference.top_k_weights(p, config.top_k, config.gate)
    if config.selection == "top_p":
        return reference.top_p_weights(p, config.top_p)
    capacity = selection.expert_capacity(*p.shape, config.capacity_factor)
    return reference.expert_choice_weights(p, capacity)


def reference_apply(layer, params, x):
    config = layer.config
    if config.kind == "aoe":
        p = reference.aoe_scores(x, params["w_down"])
    else:
        p = (jax.nn.silu(x @ params["w_router_hidden"]) if config.large_router else x) @ params["w_router"]
    weights = reference_weights(config, p)
    if config.low_rank:
        y = reference.aoe_experts(x, weights, *(params[name] for name in WEIGHTS["aoe"]))
    else:
        y = reference.router_experts(x, weights, params["w_g"], params["w_p"], params["w_o"])
    # Eq. 2 and Eq. 8, as they are written.
    probability = jax.nn.softmax(p)
    load = jax.lax.stop_gradient((weights > 0).astype(p.dtype).mean(axis=0))
    aux_loss = config.n_experts * (load * probability.mean(axis=0)).sum()
    return y, aux_loss, -(probability * jnp.log(probability)).sum(axis=1).mean()


def fast_apply(layer, params, x):
    y, stats = layer.apply({"params": params}, x)
    return y, balance_loss(stats.load, stats.mean_probability), stats.confidence_entropy


def assert_agree(layer, params, x, tolerance):
    """Outputs, balance loss and Ent_conf; gradients of a random projection of them in parameters and tokens."""
    cotangent = jax.random.normal(jax.random.key(9), x.shape, x.dtype)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, params, x):
        value, pull_back = jax.vjp(function, params, x)
        return value, *pull_back((cotangent, 0.7 * jnp.ones_like(value[1]), -0.3 * jnp.ones_like(value[2])))

    got = value_and_gradients(partial(fast_apply, layer), params, x)
    want = value_and_gradients(partial(reference_apply, layer), params, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(b).max()), 1.0)
        np.testing.assert_allclose(np.asarray(a, float) / scale, np.asarray(b, float) / scale, atol=tolerance)


VARIANTS = {
    "chosen": {},
    "all": {"gate": "all"},
    "top-1": {"top_k": 1},
    "every expert": {"top_k": 5},
    "top-p": {"selection": "top_p", "top_p": 0.6},
    "expert choice": {"selection": "expert_choice", "capacity_factor": 2.0},
}


@pytest.mark.parametrize("kind", ["aoe", "router"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_reference_in_float64(x64, kind, variant):
    assert_agree(*make(kind, **VARIANTS[variant]), TOLERANCE["float64"])


@pytest.mark.parametrize("ablation", ["factorised_gate", "large_router"])
def test_ablations_agree_with_the_reference(x64, ablation):
    assert_agree(*make("router", **{ablation: True}), TOLERANCE["float64"])


@pytest.mark.parametrize("kind", ["aoe", "router"])
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_in_float32(kind, seed):
    rng = np.random.default_rng(seed)
    n_experts = int(rng.integers(1, 12))
    layer, params, x = make(
        kind,
        n_tokens=int(rng.integers(1, 200)),
        d_model=int(rng.integers(5, 40)),
        dtype="float32",
        seed=seed,
        n_experts=n_experts,
        top_k=int(rng.integers(1, n_experts + 1)),
        d_ffn=int(rng.integers(8, 60)),
    )
    assert_agree(layer, params, x, TOLERANCE["float32"])


@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_bfloat16(kind):
    """Rounded inputs, exact reference: outputs and gradients within 5% of the largest. Ties of rounded scores are rare
    enough here that both choose the same experts."""
    layer, params, x = make(kind, dtype="bfloat16", n_tokens=24)
    exact = dataclasses.replace(layer, dtype=jnp.float32)
    got = layer.apply({"params": params}, x)[0]
    assert got.dtype == jnp.bfloat16
    to_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    chosen = [layer.apply({"params": p}, t)[1].load for layer, (p, t) in ((layer, (params, x)), (exact, to_float32))]
    np.testing.assert_allclose(*chosen, atol=1e-6)

    @partial(jax.jit, static_argnums=0)
    def gradient(layer, params, x):
        return jax.grad(lambda p, x: (layer.apply({"params": p}, x)[0] ** 2).sum(), (0, 1))(params, x)

    got = (got, gradient(layer, params, x))
    want = (reference_apply(exact, *to_float32)[0], gradient(exact, *to_float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, float) / scale, np.asarray(b) / scale, atol=TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_ties_go_to_the_lower_expert(x64, kind):
    layer, params, x = make(kind)
    params = {k: jnp.repeat(v[:1], v.shape[0], 0) if k != "w_router" else jnp.ones_like(v) for k, v in params.items()}
    stats = jax.jit(layer.apply)({"params": params}, x)[1]
    np.testing.assert_allclose(stats.load, [1, 1, 0, 0, 0], atol=1e-12)
    assert_agree(layer, params, x, TOLERANCE["float64"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_tokens_have_finite_gradients(x64, variant):
    layer, params, x = make("aoe", **VARIANTS[variant])
    x = x.at[:7].set(0)
    grads = jax.jit(jax.grad(lambda p, x: layer.apply({"params": p}, x)[0].sum(), (0, 1)))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert_agree(layer, params, x, TOLERANCE["float64"])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_all_tokens_choose_the_same_experts(x64, kind, top_k):
    """The others get no rows at all, and a gradient of exactly zero."""
    layer, params, x = make(kind, top_k=top_k)
    if kind == "aoe":
        params["w_down"] = params["w_down"].at[3].mul(100.0).at[1].mul(10.0)
    else:
        x = x.at[:, 0].set(50.0)
        params["w_router"] = params["w_router"].at[0].set(jnp.array([0.0, 1, 0, 2, 0]))
    stats = jax.jit(layer.apply)({"params": params}, x)[1]
    np.testing.assert_allclose(stats.load, [0, top_k - 1, 0, 1, 0], atol=1e-12)
    assert_agree(layer, params, x, TOLERANCE["float64"])
    grads = jax.jit(jax.grad(lambda p: layer.apply({"params": p}, x)[0].sum()))(params)
    for name in ("w_p", "w_o"):
        np.testing.assert_array_equal(grads[name][0], 0)


def test_one_expert_is_the_dense_layer(x64):
    """A router MoE of one expert, whose weight is 1, computes what the dense layer does."""
    layer, params, x = make("router", n_experts=1, top_k=1)
    dense = DenseLayer(ExpertsConfig(kind="dense", d_ffn=16), jnp.float64)
    dense_params = {name: params[name][0] for name in ("w_g", "w_p", "w_o")}
    got = dense.apply({"params": dense_params}, x)[0]
    np.testing.assert_allclose(got, layer.apply({"params": params}, x)[0], atol=1e-12)


def test_gate_pre_activations_start_with_equal_variance():
    """`(x Wdown) Wup` of AoE, `x Wg` of the router MoE and of the dense layer: variance 1 on normalised tokens."""
    d_model, settings = 128, {"n_experts": 8, "d_ffn": 256}
    x = jax.random.normal(jax.random.key(0), (512, d_model))
    variances = {}
    for d_low in (8, 32, 96):
        config = ExpertsConfig(d_low=d_low, **settings)
        p = AoELayer(config).init(jax.random.key(d_low), x)["params"]
        variances[f"aoe r={d_low}"] = jnp.var(jnp.einsum("td,ndr,nrw->ntw", x, p["w_down"], p["w_up"]))
    p = RouterLayer(ExpertsConfig(kind="router", **settings)).init(jax.random.key(1), x)["params"]
    variances["router"] = jnp.var(jnp.einsum("td,ndf->ntf", x, p["w_g"]))
    p = DenseLayer(ExpertsConfig(kind="dense", **settings)).init(jax.random.key(2), x)["params"]
    variances["dense"] = jnp.var(x @ p["w_g"])
    for name, variance in variances.items():
        assert abs(float(variance) - 1) < 0.05, (name, variances)


@pytest.mark.parametrize("kind", ["aoe", "router", "dense"])
def test_leading_axes_are_tokens(kind):
    layer, params, x = make(kind, n_tokens=24, dtype="float32")
    flat = layer.apply({"params": params}, x)[0]
    shaped = layer.apply({"params": params}, x.reshape(2, 3, 4, -1))[0]
    np.testing.assert_array_equal(shaped.reshape(24, -1), flat)


def test_public_reference_signatures(x64):
    """`aoe_layer` and `router_layer` are the layers of arrays that the documentation promises."""
    for kind, function in (("aoe", reference.aoe_layer), ("router", reference.router_layer)):
        for gate in ("chosen", "all"):
            layer, params, x = make(kind, gate=gate)
            jitted = jax.jit(partial(function, top_k=2, gate=gate))
            got = jitted(x, *(params[name] for name in WEIGHTS[kind]))
            np.testing.assert_allclose(got, jax.jit(layer.apply)({"params": params}, x)[0], atol=1e-10)


def test_scoring_is_one_matmul():
    """Eq. 4: in the whole layer, Wdown of all experts takes part in a single matrix product."""
    layer, params, x = make("aoe", dtype="float32")
    lines = jax.jit(layer.apply).lower({"params": params}, x).as_text().splitlines()
    assert sum("dot_general" in line and "5x12x4xf32" in line for line in lines) == 1
