"""Layers over meshes of eight devices against the same layer on one: values, gradients, losses, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax.config import BalanceConfig, ExpertsConfig
from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.layer import LAYERS
from aoe_jax.sharding import MESH_AXES

B, S, D = 16, 8, 8
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 4, 1), (2, 1, 1, 4)]
KINDS = {
    "aoe": {"kind": "aoe"},
    "router": {"kind": "router"},
    "gate of all": {"kind": "aoe", "gate": "all"},
    "as published": {"kind": "aoe", "score_gradient": "dense"},
    "top-p": {"kind": "aoe", "selection": "top_p"},
    "expert choice": {"kind": "aoe", "selection": "expert_choice"},
    "router, top-p": {"kind": "router", "selection": "top_p"},
    "router, expert choice": {"kind": "router", "selection": "expert_choice"},
    "factorised": {"kind": "router", "factorised_gate": True},
    "large router": {"kind": "router", "large_router": True},
    "dense": {"kind": "dense"},
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make(settings, transport="ring", recompute=False, aux_tokens=1.0):
    config = ExpertsConfig(**{"n_experts": 8, "top_k": 2, "d_ffn": 16, "d_low": 8, "d_wide": None} | settings)
    if config.low_rank:
        config = ExpertsConfig(**{"n_experts": 8, "top_k": 2, "d_ffn": 16, "d_low": 8, "d_wide": 16} | settings)
    layer = LAYERS[config.kind](config, jnp.float64, BalanceConfig(aux_tokens=aux_tokens), recompute, transport)
    x = jax.random.normal(jax.random.key(0), (B, S, D), jnp.float64)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), layer.init(jax.random.key(1), x)["params"])
    weights = jnp.ones((B, S)).at[3, 5:].set(0)  # padding counts in no statistic
    return layer, params, x, weights


def evaluate(layer, params, x, weights, bias=None):
    """Output, statistics, and the gradients of a projection of them."""
    cotangent = jax.random.normal(jax.random.key(2), x.shape, x.dtype)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x, weights, bias)
        balance = balance_loss(stats.load, stats.mean_probability) + 0.3 * stats.confidence_entropy
        return (y * cotangent).sum() + balance, (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


def on_mesh(shape, *args):
    mesh = Mesh(np.reshape(jax.devices(), shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        return evaluate(*args)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, float(jnp.abs(b).max())))


def transports(shape):
    return ["ring", "all_to_all"] if shape[2] > 1 else ["ring"]


CASES = [(shape, t, kind) for shape in MESHES for t in transports(shape) for kind in ("aoe", "router")]
CASES += [
    ((1, 2, 2, 2), t, kind) for t in ("ring", "all_to_all") for kind in KINDS if kind not in ("aoe", "router", "dense")
]
CASES += [((2, 2, 1, 2), "ring", kind) for kind in ("dense", "top-p", "expert choice", "as published")]


@pytest.mark.parametrize(("shape", "transport", "kind"), CASES)
def test_a_mesh_computes_what_one_device_does(x64, shape, transport, kind):
    layer, params, x, weights = make(KINDS[kind], transport)
    assert_same(on_mesh(shape, layer, params, x, weights), evaluate(layer, params, x, weights))
