"""The router of DeepSeek-V3: values and gradients by loops, on one device and over meshes, groups,
the selection bias, and L_aux.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import RouterLayer
from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.sigmoid_top_k import SigmoidTopK, in_best_groups, sigmoid_top_k_weights
from aoe_jax.moe.balance import balance_loss
from tests.arrays import assert_close, mesh_of, normal
from tests.config.refused import check_refused
from tests.methods.method_layers import by_loops
from tests.moe.drawn import parameters_of

N, K, D, B, S = 8, 2, 8, 8, 4
SETTINGS = {
    "normalised, in groups": SigmoidTopK(True, 2.5, n_groups=4, groups_per_token=2),
    "one group of two": SigmoidTopK(False, 1.5, n_groups=2, groups_per_token=1),
    "without groups": SigmoidTopK(),
}

pytestmark = [pytest.mark.usefixtures("x64", "ragged")]


def make(routing, balance=None):
    """`(layer, parameters, x [B, S, d], bias [n])`; the bias changes choices."""
    experts = ExpertsConfig(kind="router", n_experts=N, top_k=K, d_ffn=16)
    layer = RouterLayer(
        experts,
        routing=routing,
        balance=balance or BalanceConfig(),
        dtype=jnp.float64,
        training=True,
    )
    x = normal(0, (B, S, D), jnp.float64)
    return layer, parameters_of(layer, x), x, jnp.linspace(-0.4, 0.4, N)


def weights_by_loops(routing, logits, bias):
    settings = routing.n_groups, routing.groups_per_token, routing.norm_topk_prob, routing.scale
    return sigmoid_top_k_weights(logits, bias, K, *settings)


def with_gradients(apply, params, x):
    def loss(params, x):
        y = apply(params, x)
        return (y**2).sum(), y

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def through_layer(layer, bias, params, x):
    return jax.jit(lambda p, x: layer.apply({"params": p}, x, routing_state=bias)[0])(params, x)


@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_by_loops_here_and_on_a_mesh(settings):
    routing = SETTINGS[settings]
    layer, params, x, bias = make(routing)

    def slow(params, x):
        flat = x.reshape(-1, D)
        weights = weights_by_loops(routing, flat @ params["w_router"], bias)
        return by_loops(params, flat, weights).reshape(x.shape)

    want = with_gradients(slow, params, x)
    fast = partial(through_layer, layer, {"selection_bias": bias})
    assert_close(with_gradients(fast, params, x), want, 1e-10)
    mesh = mesh_of(1, 2, 2, 2)
    with jax.set_mesh(mesh):
        assert_close(with_gradients(fast, params, x), want, 1e-10)
    unbiased = through_layer(layer, {"selection_bias": jnp.zeros(N)}, params, x)
    assert jnp.abs(unbiased - want[1]).max() > 1e-2


def test_groups_rank_by_the_sum_of_their_two_best():
    ranked = jnp.array([[0.9, 0.1, 0.5, 0.6], [0.2, 0.3, 0.4, 0.0]])
    kept = jnp.isfinite(in_best_groups(ranked, 2, 1))
    assert_array_equal(kept, [[False, False, True, True], [True, True, False, False]])
    three = jnp.array([[0.5, 0.5, 0.0, 0.4, 0.4, 0.4]])
    assert_array_equal(jnp.isfinite(in_best_groups(three, 2, 1))[0, :3], True)


def test_aux_loss_is_of_the_normalised_scores():
    """Equations 17 to 20 of the paper, sequence by sequence, up to our factor K."""
    layer, params, x, bias = make(
        SETTINGS["normalised, in groups"], BalanceConfig(aux_batch="sequence")
    )
    state = {"selection_bias": bias}
    stats = jax.jit(lambda: layer.apply({"params": params}, x, routing_state=state)[1])()
    logits = x @ params["w_router"]
    scores = jax.nn.sigmoid(logits)
    losses = []
    for b in range(B):
        chosen = weights_by_loops(layer.routing, logits[b], bias) > 0
        share = (scores[b] / scores[b].sum(axis=1, keepdims=True)).mean(axis=0)
        losses.append(N / K * (chosen.mean(axis=0) * share).sum())
    assert_allclose(stats.sequence_loss, K * np.mean(losses), rtol=1e-10)
    assert balance_loss(stats.load, stats.mean_probability) != stats.sequence_loss


@pytest.mark.parametrize(("rate", "moved"), [(0.0, 0.0), (1e-3, 1e-3)])
def test_the_bias_moves_by_the_rate_or_stays(rate, moved):
    layer, params, x, bias = make(SETTINGS["without groups"])
    stats = layer.apply({"params": params}, x, routing_state={"selection_bias": bias})[1]
    stacked = jax.tree.map(lambda a: a[None], stats)
    config = Config(
        experts=layer.experts, routing=layer.routing, balance=BalanceConfig(bias_rate=rate)
    )
    state, changed = layer.routing.update(config, {"selection_bias": bias[None]}, stacked, {})
    want = bias + moved * np.sign(stats.load.mean() - stats.load)
    assert_allclose(state["selection_bias"][0], want, rtol=1e-12)
    assert changed == {}


REFUSED = """
experts.kind=aoe => routing.name='sigmoid_top_k' ... is for a plain router
experts.large_router=True => routing.name='sigmoid_top_k' ... is for a plain router with whole gates
routing.n_groups=3 => must divide experts.n_experts=8
routing.n_groups=8 => groups of at least 2
routing.n_groups=4; experts.top_k=3 => routing.groups_per_token=1 ... leaves 2 experts
routing.groups_per_token=2 => and at most routing.n_groups=1
balance.z_weight=0.001 => is not implemented
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    settings, _, wanted = case.partition(" => ")
    kind = "" if "kind" in case else "; experts.kind=router"
    check_refused(f"{settings}{kind}; experts.n_experts=8; routing.name=sigmoid_top_k => {wanted}")
