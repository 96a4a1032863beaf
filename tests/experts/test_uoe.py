"""Union-of-Experts-style layers against plain loops, their extremes, meshes, few tokens, and what
they refuse.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax import DenseLayer, UoELayer
from aoe_jax.config import BalanceConfig, Config, ExpertsConfig
from aoe_jax.config.methods import UoEConfig
from aoe_jax.counts import forward_flops_per_token, parameter_counts
from aoe_jax.errors import UserError
from aoe_jax.experts import reference
from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.parallel import Devices
from aoe_jax.experts.uoe import routing_neurons
from aoe_jax.plan import plan
from aoe_jax.sharding import MESH_AXES
from aoe_jax.topology import topology_devices
from tests.experts.drawn import parameters_of
from tests.runs import tiny_config

N, D, WIDTH, ROUTING = 8, 8, 16, 4

pytestmark = pytest.mark.smoke


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make(
    n_tokens=(16, 8),
    dtype="float64",
    transport="ring",
    recompute=False,
    routing=ROUTING,
    **settings,
):
    config = ExpertsConfig(**{"kind": "uoe", "n_experts": N, "top_k": 2, "d_ffn": WIDTH} | settings)
    layer = UoELayer(
        config, jnp.dtype(dtype), BalanceConfig(), recompute, transport, settings=UoEConfig(routing)
    )
    x = jax.random.normal(jax.random.key(0), (*n_tokens, D), dtype)
    return layer, parameters_of(layer, x), x


def by_loops(layer, params, x, bias=0.0):
    """`(y, balance loss, Ent_conf)`: every expert in turn, its first neurons, then the others."""
    c, shape = layer.config, x.shape
    x = x.reshape(-1, D)
    activations = [
        jax.nn.silu(x @ w_g) * (x @ w_p)
        for w_g, w_p in zip(params["w_g_route"], params["w_p_route"], strict=True)
    ]
    y = sum(a @ w_o for a, w_o in zip(activations, params["w_o_route"], strict=True))
    scores = jnp.stack([reference.l2_norm(a) for a in activations], axis=1)
    if c.selection == "top_p":
        weights = reference.top_p_weights(scores, c.top_p)
    else:
        weights = reference.top_k_weights(scores + bias, c.top_k, c.gate)
        if np.any(bias):
            chosen = jnp.where(weights > 0, scores, -jnp.inf)
            weights = jax.nn.softmax(chosen if c.gate == "chosen" else scores) * (weights > 0)
    y += reference.router_experts(x, weights, params["w_g"], params["w_p"], params["w_o"])
    probability = jax.nn.softmax(scores)
    load = jax.lax.stop_gradient((weights > 0).astype(x.dtype).mean(axis=0))
    entropy = -(probability * jnp.log(probability)).sum(axis=1).mean()
    return y.reshape(shape), N * (load * probability.mean(axis=0)).sum(), entropy


def by_layer(layer, params, x):
    y, stats = layer.apply({"params": params}, x)
    return y, balance_loss(stats.load, stats.mean_probability), stats.confidence_entropy


def values_and_gradients(function, params, x):
    cotangent = jax.random.normal(jax.random.key(9), x.shape, x.dtype)

    @jax.jit
    def run(params, x):
        value, pull_back = jax.vjp(function, params, x)
        return value, pull_back(
            (cotangent, 0.7 * jnp.ones_like(value[1]), -0.3 * jnp.ones_like(value[2]))
        )

    return run(params, x)


def assert_same(got, want, tolerance=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("settings", "recompute"),
    [({}, False), ({}, True), ({"gate": "all"}, False), ({"selection": "top_p"}, True)],
    ids=str,
)
def test_agrees_with_loops(x64, ragged, settings, recompute):
    layer, params, x = make(recompute=recompute, **settings)
    want = values_and_gradients(partial(by_loops, layer), params, x)
    assert_same(values_and_gradients(partial(by_layer, layer), params, x), want)


@pytest.mark.parametrize(
    ("shape", "transport"),
    [((1, 2, 2, 2), "ring"), ((1, 2, 2, 2), "all_to_all"), ((2, 1, 1, 4), "ring")],
)
def test_a_mesh_computes_what_one_device_does(x64, ragged, shape, transport):
    layer, params, x = make(transport=transport)
    mesh = Mesh(np.reshape(jax.devices(), shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        got = values_and_gradients(partial(by_layer, layer), params, x)
    assert_same(got, values_and_gradients(partial(by_loops, layer), params, x))


def test_a_selection_bias_chooses_and_does_not_weigh(x64, ragged):
    layer, params, x = make()
    bias = jnp.array([0.0, -50, 0, 50, 0, 0, 0, 0])
    y, stats = jax.jit(layer.apply)({"params": params}, x, routing_state={"selection_bias": bias})
    assert float(stats.load[3]) == 1 and float(stats.load[1]) == 0
    np.testing.assert_allclose(y, by_loops(layer, params, x, bias)[0], atol=1e-10)


def test_if_all_neurons_are_routing_neurons_it_is_the_sum_of_all_experts(x64):
    w = {name: jnp.concatenate([w, p], axis) for name, w, p, axis in joined(make()[1])}
    x = jax.random.normal(jax.random.key(2), (5, D), float)
    _, y = routing_neurons(Devices(), x.dtype, x, {f"{name}_route": w[name] for name in w})
    want = reference.router_experts(x, jnp.ones((5, N)), w["w_g"], w["w_p"], w["w_o"])
    np.testing.assert_allclose(y, want, atol=1e-10)


def joined(params):
    """`(name, routing part, the rest, axis of neurons)` of each matrix."""
    for name, axis in (("w_g", 2), ("w_p", 2), ("w_o", 1)):
        yield name, params[f"{name}_route"], params[name], axis


def test_one_expert_is_the_dense_layer_of_all_its_neurons(x64, ragged):
    """Its weight is 1: the two parts make up the neurons, none is left out and none counts twice."""
    layer, params, x = make(n_experts=1, top_k=1)
    whole = {name: jnp.concatenate([w, p], axis)[0] for name, w, p, axis in joined(params)}
    dense = DenseLayer(ExpertsConfig(kind="dense", d_ffn=WIDTH), dtype=jnp.float64)
    got = jax.jit(layer.apply)({"params": params}, x)[0]
    np.testing.assert_allclose(got, dense.apply({"params": whole}, x)[0], atol=1e-12)


def test_where_the_rest_is_silent_the_virtual_shared_expert_is_left(x64, ragged):
    """As with no expert chosen at all."""
    layer, params, x = make()
    silent = params | {"w_o": jnp.zeros_like(params["w_o"])}
    y, stats = jax.jit(layer.apply)({"params": silent}, x)
    scores, shared = routing_neurons(Devices(), x.dtype, x.reshape(-1, D), params)
    np.testing.assert_allclose(y, shared.reshape(x.shape), atol=1e-12)
    np.testing.assert_allclose(stats.mean_score, scores.mean(axis=0), atol=1e-12)


def test_who_gets_a_gradient(x64, ragged):
    """All routing neurons; of the rest, that of chosen experts alone. Zero tokens do no harm."""
    layer, params, x = make((1,), top_k=1)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            y, stats = layer.apply({"params": params}, x)
            return (y**2).sum(), stats.load

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (grads, _), load = gradients(params, x)
    chosen = np.flatnonzero(load)
    assert len(chosen) == 1
    for name, route, rest, _ in joined(grads):
        assert all(np.abs(route[i]).max() > 0 for i in range(N)), name
        assert [i for i in range(N) if np.abs(rest[i]).max() > 0] == list(chosen), name
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients(params, jnp.zeros_like(x))))


def test_few_tokens_go_row_by_row(x64):
    """Fewer rows than experts: the backend of decoding, and another product for the scores."""
    layer, params, x = make((40,))
    apply = jax.jit(lambda x: layer.apply({"params": params}, x)[0])
    np.testing.assert_allclose(apply(x[:3]), apply(x)[:3], atol=1e-10)


def test_drawn_like_whole_matrices():
    config, x = ExpertsConfig(kind="uoe", d_ffn=512), jnp.zeros((4, 64))
    layer = UoELayer(config, settings=UoEConfig(128))
    params = parameters_of(layer, x)
    for name, route, rest, _ in joined(params):
        for part in (route, rest):
            assert abs(float(part.std()) / (64 if name != "w_o" else 512) ** -0.5 - 1) < 0.02


def test_counts_and_plans():
    """A traditional expert's parameters; FLOPs of all routing neurons and of the rest of K experts."""
    config, moe = (tiny_config(experts__kind=kind, experts__d_ffn=48) for kind in ("uoe", "router"))
    c, d = config.experts, config.model.d_model
    assert config.uoe.routing_neurons == 24  # d_ffn / top_k
    routers = config.model.n_layers * d * c.n_experts
    assert parameter_counts(config).total == parameter_counts(moe).total - routers
    neurons = c.n_experts * 24 + c.top_k * 24
    more = forward_flops_per_token(config) - forward_flops_per_token(moe) + 2 * routers
    assert more == config.model.n_layers * 6 * d * (neurons - c.top_k * 48)
    _, devices = topology_devices("v5e:2x2")
    config = tiny_config(experts__kind="uoe", mesh__data=1, mesh__expert=2, mesh__tensor=2)
    assert (
        plan(config, "v5e", devices, compiles=False)["parameters"] == parameter_counts(config).total
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"experts": {"kind": "uoe", "selection": "threshold"}},
            "experts.selection='threshold': isn't implemented",
        ),
        (
            {"experts": {"kind": "uoe", "selection": "expert_choice"}},
            "experts.selection='expert_choice': isn't",
        ),
        (
            {"experts": {"kind": "uoe", "gate": "sparsemixer"}},
            "experts.gate='sparsemixer': isn't implemented",
        ),
        (
            {"experts": {"kind": "uoe", "top_k": 1}},
            "uoe.routing_neurons=None: comes to 512 for experts.top_k=1",
        ),
        (
            {"experts": {"kind": "uoe"}, "uoe": {"routing_neurons": 512}},
            "uoe.routing_neurons=512: must be at least 1",
        ),
        (
            {"experts": {"kind": "uoe"}, "uoe": {"routing_neurons": 0}},
            "uoe.routing_neurons=0: must be at least 1",
        ),
        (
            {"experts": {"kind": "uoe"}, "balance": {"z_weight": 0.1}},
            "balance.z_weight=0.1: with experts.kind='uoe'",
        ),
        (
            {"experts": {"kind": "uoe"}, "balance": {"aux_batch": "sequence"}},
            "balance.aux_batch='sequence': with",
        ),
        (
            {"experts": {"kind": "uoe", "selection": "threshold"}, "threshold": {"decay": 0.5}},
            "experts.selection='threshold': isn't implemented",
        ),
        ({"uoe": {"routing_neurons": 4}}, "uoe.routing_neurons=4: belongs to experts.kind='uoe'"),
        (
            {"experts": {"kind": "uoe"}, "uoe": {"routing_neurons": 30}, "mesh": {"tensor": 4}},
            "mesh.tensor=4: must divide uoe.routing_neurons=30",
        ),
    ],
)
def test_what_is_refused(groups, message):
    with pytest.raises(UserError) as error:
        Config.from_config_dict(groups)
    assert message in str(error.value)
