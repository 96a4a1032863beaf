"""The router of DeepSeek-V3: values and gradients by loops, the selection bias, and L_aux."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.config.experts import BalanceConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.sigmoid_top_k import SigmoidTopK
from aoe_jax.moe.load_balance import balance_loss
from tests.methods import method_layers
from tests.methods.method_layers import assert_agree, by_loops

N, K, B, S, D = 8, 2, 4, 4, 8
BIAS = np.linspace(-0.4, 0.4, N)
STATE = {"selection_bias": BIAS}
SETTINGS = {
    "normalised, in groups": SigmoidTopK(True, 2.5, n_groups=4, groups_per_token=2),
    "one group of two": SigmoidTopK(False, 1.5, n_groups=2, groups_per_token=1),
    "without groups": SigmoidTopK(),
}

pytestmark = [pytest.mark.usefixtures("x64", "ragged")]


def make(settings):
    return method_layers.make("router", SETTINGS[settings], (B, S, D), n_experts=N)


def weights_by_loops(routing, logits, bias):
    """Weights `[T, n]` of `logits [T, n]` and the bias `[n]`."""
    scores, size = jax.nn.sigmoid(logits), N // routing.n_groups
    chosen = np.zeros(logits.shape)
    for row, biased in zip(chosen, np.asarray(jax.lax.stop_gradient(scores) + bias), strict=True):
        groups = [range(first, first + size) for first in range(0, N, size)]
        groups.sort(key=lambda group: -sum(sorted(biased[i] for i in group)[-2:]))
        allowed = [i for group in groups[: routing.groups_per_token] for i in group]
        row[sorted(allowed, key=lambda i: -biased[i])[:K]] = 1
    weights = scores * chosen
    if routing.norm_topk_prob:
        weights /= weights.sum(axis=1, keepdims=True)
    return routing.scale * weights


@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_by_loops(settings):
    layer, params, x = make(settings)

    def formula(params, x):
        logits = (x @ params["w_router"]).reshape(-1, N)
        return by_loops(params, x, weights_by_loops(layer.routing, logits, BIAS))

    assert_agree(layer, params, x, formula, routing_state=STATE)
    logits = (x @ params["w_router"]).reshape(-1, N)
    biased, plain = (weights_by_loops(layer.routing, logits, bias) for bias in (BIAS, 0 * BIAS))
    assert jnp.abs(biased - plain).max() > 0.1


def test_aux_loss_is_of_the_normalised_scores():
    """Equations 17 to 20 of the paper, sequence by sequence, up to our factor K."""
    layer, params, x = make("normalised, in groups")
    layer = layer.clone(balance=BalanceConfig(aux_batch="sequence"))
    stats = jax.jit(layer.apply)({"params": params}, x, routing_state=STATE)[1]
    logits = x @ params["w_router"]
    scores, losses = jax.nn.sigmoid(logits), []
    for b in range(B):
        chosen = weights_by_loops(layer.routing, logits[b], BIAS) > 0
        share = (scores[b] / scores[b].sum(axis=1, keepdims=True)).mean(axis=0)
        losses.append(N / K * (chosen.mean(axis=0) * share).sum())
    assert_allclose(stats.sequence_loss, K * np.mean(losses), rtol=1e-10)
    assert balance_loss(stats.load, stats.mean_probability) != stats.sequence_loss


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_the_bias_moves_by_the_rate_or_stays(rate):
    layer, params, x = make("without groups")
    stats = layer.apply({"params": params}, x, routing_state=STATE)[1]
    stacked = jax.tree.map(lambda a: a[None], stats)
    config = Config(
        experts=dataclasses.replace(layer.experts, kind="router"),
        routing=layer.routing,
        balance=BalanceConfig(bias_rate=rate),
    )
    state, changed = layer.routing.update(config, {"selection_bias": BIAS[None]}, stacked, {})
    want = BIAS + rate * np.sign(stats.load.mean() - stats.load)
    assert_allclose(state["selection_bias"][0], want, rtol=1e-12)
    assert changed == {}
