"""Experts chosen by norms, against plain loops; on meshes as alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax import RouterLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.evaluation.probing import (
    NODES,
    NORMS,
    ProbeRouter,
    by_chance,
    by_first_neurons,
    by_norm,
    by_router,
)
from tests.arrays import mesh_of

pytestmark = pytest.mark.usefixtures("ragged")

EXPERTS = ExpertsConfig(kind="router", n_experts=4, top_k=2, d_ffn=12)
X = jax.random.normal(jax.random.key(0), (8, 6, 16))
WEIGHTS = (jnp.arange(48) % 5 > 0).reshape(8, 6).astype(jnp.float32)
PARAMS = jax.jit(RouterLayer(EXPERTS).init)(jax.random.key(1), X)["params"]


def apply(choose, equal_weights=False):
    layer = RouterLayer(EXPERTS, routing=ProbeRouter(choose, equal_weights))
    y, stats = jax.jit(partial(layer.apply, {"params": PARAMS}))(X, WEIGHTS)
    return np.asarray(y).reshape(-1, 16), float(stats.records["agreement"])


def silu(a):
    return a / (1 + np.exp(-a))


def at_nodes(x, expert):
    """What an expert computes of a token, node by node."""
    w_gate, w_up, w_down = (
        np.asarray(PARAMS[name][expert], np.float64) for name in ("w_gate", "w_up", "w_down")
    )
    gate, up = x @ w_gate, x @ w_up
    return {
        "x Wg": gate,
        "x Wp": up,
        "SiLU(x Wg)": silu(gate),
        "SiLU(x Wg) * x Wp": silu(gate) * up,
        "output": (silu(gate) * up) @ w_down,
    }


PLAIN_NORMS = {"L1": 1, "L2": 2, "Linf": np.inf}


def by_loops(node, norm, equal_weights):
    outputs, shares = [], []
    for x in np.asarray(X, np.float64).reshape(-1, 16):
        experts = [at_nodes(x, expert) for expert in range(4)]
        scores = np.array([np.linalg.norm(expert[node], PLAIN_NORMS[norm]) for expert in experts])
        chosen = np.argsort(-scores)[:2]
        weights = np.exp(scores[chosen] - scores[chosen].max())
        weights = np.full(2, 0.5) if equal_weights else weights / weights.sum()
        outputs.append(
            sum(weight * experts[i]["output"] for weight, i in zip(weights, chosen, strict=True))
        )
        routed = np.argsort(-(x @ np.asarray(PARAMS["w_router"], np.float64)))[:2]
        shares.append(len({*chosen} & {*routed}) / 2)
    return np.stack(outputs), np.average(shares, weights=np.asarray(WEIGHTS).reshape(-1))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("node", "norm"), [*((node, "L2") for node in NODES), *(("x Wg", norm) for norm in NORMS)]
)
def test_choice_by_norm(node, norm):
    y, agreement = apply(by_norm(node, norm))
    want, want_agreement = by_loops(node, norm, equal_weights=False)
    np.testing.assert_allclose(y, want, atol=1e-4)
    np.testing.assert_allclose(agreement, want_agreement, rtol=1e-5)
    assert 0.3 < agreement < 0.8


def test_choice_by_first_neurons():
    """All neurons have the norm of their node; the largest is signed."""
    want = by_loops("x Wg", "L2", equal_weights=False)[0]
    np.testing.assert_allclose(apply(by_first_neurons(12, "norm"))[0], want, atol=1e-4)
    w_gate, x = np.asarray(PARAMS["w_gate"]), np.asarray(X).reshape(-1, 16)
    scores = np.einsum("td,ndf->tnf", x, w_gate[..., :3]).max(axis=-1)
    routed, chosen = (
        (-a).argsort().argsort() < 2 for a in (x @ np.asarray(PARAMS["w_router"]), scores)
    )
    share = np.average((routed & chosen).sum(axis=1) / 2, weights=np.asarray(WEIGHTS).reshape(-1))
    np.testing.assert_allclose(apply(by_first_neurons(3, "max"))[1], share, rtol=1e-5)


def test_equal_weights():
    np.testing.assert_allclose(
        apply(by_norm("x Wg", "L2"), True)[0], by_loops("x Wg", "L2", True)[0], atol=1e-4
    )


def test_choice_of_the_router():
    y, agreement = apply(by_router)
    assert agreement == 1
    np.testing.assert_array_equal(
        y, jax.jit(RouterLayer(EXPERTS).apply)({"params": PARAMS}, X, WEIGHTS)[0].reshape(-1, 16)
    )


def test_choice_by_chance():
    y, agreement = apply(by_chance, True)
    assert 0.3 < agreement < 0.7  # half of four on average
    assert float(np.abs(y - apply(by_router, True)[0]).max()) > 0.1


@pytest.mark.parametrize(
    "choose", [by_norm("SiLU(x Wg) * x Wp", "L2"), by_chance], ids=["norm", "chance"]
)
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 2, 4, 1)], ids=str)
def test_meshes_choose_alike(shape, choose):
    want = apply(choose)
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        got = apply(choose)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
