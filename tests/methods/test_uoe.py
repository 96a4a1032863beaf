"""Union-of-Experts-style layers by plain loops, their extremes, meshes, few tokens, and what is
refused.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax import DenseLayer, ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods.uoe import UoE, routing_neurons
from aoe_jax.model.counts import forward_flops_per_token, parameter_counts
from aoe_jax.moe import reference
from aoe_jax.moe.balance import balance_loss
from aoe_jax.moe.layer import Layer
from aoe_jax.moe.parallel.collectives import Devices
from tests.arrays import assert_close, assert_finite, normal
from tests.config.refused import check_refused
from tests.methods.method_layers import small_config
from tests.moe.drawn import parameters_of

N, D, WIDTH, ROUTING = 8, 8, 16, 4

pytestmark = pytest.mark.smoke


def make(
    n_tokens=(16, 8), dtype="float64", transport="ring", recompute=False, experts=None, **settings
):
    sizes = {"n_experts": N, "top_k": 2, "d_ffn": WIDTH} | (experts or {})
    layer = ExpertsLayer(
        ExpertsConfig(kind="uoe", **sizes),
        routing=UoE(routing_neurons=ROUTING, **settings),
        dtype=jnp.dtype(dtype),
        remat="experts" if recompute else "none",
        transport=transport,
    )
    x = normal(0, (*n_tokens, D), dtype)
    return layer, parameters_of(layer, x), x


def by_loops(layer, params, x, bias=0.0):
    """`(y, balance loss, Ent_conf)`, from each expert's first neurons and then from the others."""
    method, top_k, shape = layer.routing, layer.experts.top_k, x.shape
    x = x.reshape(-1, D)
    activations = [
        jax.nn.silu(x @ w_gate) * (x @ w_up)
        for w_gate, w_up in zip(params["w_gate_route"], params["w_up_route"], strict=True)
    ]
    y = sum(a @ w_down for a, w_down in zip(activations, params["w_down_route"], strict=True))
    scores = jnp.stack([reference.l2_norm(a) for a in activations], axis=1)
    if method.p is not None:
        weights = reference.top_p_weights(scores, method.p)
    else:
        weights = reference.top_k_weights(scores + bias, top_k, method.norm_topk_prob)
        if np.any(bias):
            chosen = jnp.where(weights > 0, scores, -jnp.inf)
            weights = jax.nn.softmax(chosen if method.norm_topk_prob else scores) * (weights > 0)
    y += reference.router_experts(x, weights, params["w_gate"], params["w_up"], params["w_down"])
    probability = jax.nn.softmax(scores)
    load = jax.lax.stop_gradient((weights > 0).astype(x.dtype).mean(axis=0))
    entropy = -(probability * jnp.log(probability)).sum(axis=1).mean()
    return y.reshape(shape), N * (load * probability.mean(axis=0)).sum(), entropy


def by_layer(layer, params, x):
    y, stats = layer.apply({"params": params}, x)
    return y, balance_loss(stats.load, stats.mean_probability), stats.confidence_entropy


def values_and_gradients(function, params, x):
    cotangent = normal(9, x.shape, x.dtype)

    @jax.jit
    def run(params, x):
        value, pull_back = jax.vjp(function, params, x)
        return value, pull_back(
            (cotangent, 0.7 * jnp.ones_like(value[1]), -0.3 * jnp.ones_like(value[2]))
        )

    return run(params, x)


@pytest.mark.parametrize(
    ("settings", "recompute"),
    [({}, False), ({}, True), ({"norm_topk_prob": False}, False), ({"p": 0.6}, True)],
    ids=str,
)
def test_agrees_with_loops(x64, ragged, settings, recompute):
    layer, params, x = make(recompute=recompute, **settings)
    want = values_and_gradients(partial(by_loops, layer), params, x)
    assert_close(values_and_gradients(partial(by_layer, layer), params, x), want, 1e-10)


def settings_of(layer):
    return Layer(layer.experts, layer.routing, layer.balance, layer.dtype)


def test_a_selection_bias_changes_the_choice_and_not_the_weights(x64, ragged):
    layer, params, x = make()
    bias = jnp.array([0.0, -50, 0, 50, 0, 0, 0, 0])
    y, stats = jax.jit(layer.apply)({"params": params}, x, routing_state={"selection_bias": bias})
    assert float(stats.load[3]) == 1 and float(stats.load[1]) == 0
    assert_allclose(y, by_loops(layer, params, x, bias)[0], atol=1e-10)


def test_if_all_neurons_are_routing_neurons_it_is_the_sum_of_all_experts(x64):
    layer, params, _ = make()
    w = {name: jnp.concatenate([w, p], axis) for name, w, p, axis in parts(params)}
    x = normal(2, (5, D), float)
    _, y = routing_neurons(
        settings_of(layer), Devices(), x, {f"{name}_route": w[name] for name in w}
    )
    want = reference.router_experts(x, jnp.ones((5, N)), w["w_gate"], w["w_up"], w["w_down"])
    assert_allclose(y, want, atol=1e-10)


def parts(params):
    """`(name, routing neurons, the rest, axis of neurons)` of each matrix."""
    for name, axis in (("w_gate", 2), ("w_up", 2), ("w_down", 1)):
        yield name, params[f"{name}_route"], params[name], axis


def test_one_expert_is_the_dense_layer_of_all_its_neurons(x64, ragged):
    """Its weight is 1, and every neuron counts once in one of the two parts."""
    layer, params, x = make(experts={"n_experts": 1, "top_k": 1})
    whole = {name: jnp.concatenate([w, p], axis)[0] for name, w, p, axis in parts(params)}
    dense = DenseLayer(ExpertsConfig(kind="dense", d_ffn=WIDTH), dtype=jnp.float64)
    got = jax.jit(layer.apply)({"params": params}, x)[0]
    assert_allclose(got, dense.apply({"params": whole}, x)[0], atol=1e-12)


def test_with_zeros_for_the_rest_the_virtual_shared_expert_is_left(x64, ragged):
    """The output is that of the routing neurons alone."""
    layer, params, x = make()
    routing = {name: w for name, w in params.items() if name.endswith("_route")}
    silent = params | {"w_down": jnp.zeros_like(params["w_down"])}
    y, stats = jax.jit(layer.apply)({"params": silent}, x)
    scores, shared = routing_neurons(settings_of(layer), Devices(), x.reshape(-1, D), routing)
    assert_allclose(y, shared.reshape(x.shape), atol=1e-12)
    assert_allclose(stats.mean_score, scores.mean(axis=0), atol=1e-12)


def test_which_neurons_have_a_gradient(x64, ragged):
    """All routing neurons have one; of the rest those of chosen experts. Tokens of zeros have
    finite gradients.
    """
    layer, params, x = make((1,), experts={"top_k": 1})

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            y, stats = layer.apply({"params": params}, x)
            return (y**2).sum(), stats.load

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (grads, _), load = gradients(params, x)
    chosen = np.flatnonzero(load)
    assert len(chosen) == 1
    for name, route, rest, _ in parts(grads):
        assert all(np.abs(route[i]).max() > 0 for i in range(N)), name
        assert [i for i in range(N) if np.abs(rest[i]).max() > 0] == list(chosen), name
    assert_finite(gradients(params, jnp.zeros_like(x)))


def test_few_tokens_go_row_by_row(x64):
    """Fewer rows than experts take the backend of decoding, and another product for the scores."""
    layer, params, x = make((40,))
    apply = jax.jit(lambda x: layer.apply({"params": params}, x)[0])
    assert_allclose(apply(x[:3]), apply(x)[:3], atol=1e-10)


def test_drawn_like_whole_matrices():
    layer = ExpertsLayer(ExpertsConfig(kind="uoe", d_ffn=512), routing=UoE(routing_neurons=128))
    params = parameters_of(layer, jnp.zeros((4, 64)))
    for name, route, rest, _ in parts(params):
        for part in (route, rest):
            assert abs(float(part.std()) / (64 if name != "w_down" else 512) ** -0.5 - 1) < 0.02


def test_counts():
    """An expert has the parameters of a traditional one. A token costs all routing neurons and the
    rest of K experts.
    """
    config, moe = (small_config(experts={"kind": kind, "d_ffn": 48}) for kind in ("uoe", "router"))
    c, d = config.experts, config.model.d_model
    assert config.routing == UoE() and config.routing.neurons(c) == 24  # d_ffn / top_k
    routers = config.model.n_layers * d * c.n_experts
    assert parameter_counts(config).total == parameter_counts(moe).total - routers
    neurons = c.n_experts * 24 + c.top_k * 24
    more = forward_flops_per_token(config) - forward_flops_per_token(moe) + 2 * routers
    assert more == config.model.n_layers * 6 * d * (neurons - c.top_k * 48)


REFUSED = """
routing.name=threshold; experts.kind=uoe => choose one of uoe
routing.name=expert_choice; experts.kind=uoe => choose one of uoe
routing.name=sparsemixer; experts.kind=uoe => choose one of uoe
routing.name=threshold; experts.kind=uoe; routing.decay=0.5 => choose one of uoe
experts.kind=uoe; experts.top_k=1 => routing.routing_neurons=None ... comes to 512
routing.routing_neurons=512; experts.kind=uoe; routing.name=uoe => must be at least 1
routing.routing_neurons=0; experts.kind=uoe; routing.name=uoe => must be at least 1
routing.p=1.0; experts.kind=uoe; routing.name=uoe => must be greater than 0 and below 1
balance.z_weight=0.1; experts.kind=uoe => is not tested with experts.kind='uoe'
balance.aux_batch=sequence; experts.kind=uoe => is not tested with experts.kind='uoe'
mesh.tensor=4; experts.kind=uoe; routing.routing_neurons=30 => must divide routing_neurons=30
routing.name=uoe; experts.kind=aoe; routing.routing_neurons=4 => choose one of top_k, top_p,
uoe.routing_neurons=4 => uoe is gone ... set config.routing, with routing.name='uoe'
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    check_refused(case)
