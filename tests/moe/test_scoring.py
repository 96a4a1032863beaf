"""Products of scores: in bfloat16, and ties of the largest activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.moe.collectives import Devices
from aoe_jax.moe.layer import Layer
from aoe_jax.moe.routing import TopK
from aoe_jax.moe.scoring import (
    activation_norms,
    aoe_scores,
    codes_of_all,
    largest,
    router_logits,
    safe_root,
    scores_of_all,
)
from tests.arrays import normal

pytestmark = pytest.mark.smoke


def test_the_root_of_zero_has_no_gradient():
    assert jax.grad(safe_root)(0.0) == 0


def test_the_largest_activations_of_bfloat16_hardly_ever_tie():
    """In bfloat16 one token in seven would have two equal scores around its eighth expert."""
    x = normal(0, (512, 64), jnp.bfloat16)
    w_score = normal(1, (64, 64, 4), jnp.bfloat16)
    scores = np.sort(scores_of_all(x, w_score, largest), axis=1)
    assert scores.dtype == np.float32
    assert np.mean(scores[:, -8] == scores[:, -9]) < 0.002


def test_router_logits_of_bfloat16_are_summed_in_float32():
    x, w = normal(0, (64, 512), jnp.bfloat16), normal(1, (512, 8))
    found, pull_back = jax.vjp(router_logits, x, w)
    of_x, of_w = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, w))
    assert found.dtype == jnp.float32
    assert_allclose(found, of_x @ of_w, rtol=1e-5, atol=1e-5)
    g = normal(2, found.shape)
    for d, want in zip(pull_back(g), (g @ of_w.T, of_x.T @ g), strict=True):
        assert_allclose(np.asarray(d, np.float32), want, rtol=0.01, atol=0.02)


def test_kept_codes_of_bfloat16_give_the_scores_of_float32_codes():
    """The gradients are those of norms of the kept codes."""
    experts = ExpertsConfig(n_experts=4, top_k=2, d_ffn=8, d_low=16, score_gradient="dense")
    layer = Layer(experts, TopK(), BalanceConfig(), jnp.bfloat16, None)
    x, w = normal(0, (64, 32), jnp.bfloat16), normal(1, (4, 32, 16), jnp.bfloat16)

    def scores(w, keeps_code):
        return aoe_scores(x, w, layer, Devices(), keeps_code)

    kept = scores(w, True)
    assert kept.code.dtype == jnp.bfloat16
    assert_allclose(kept.values, scores_of_all(x, w), rtol=1e-6)
    assert np.abs(kept.values - activation_norms(kept.code)).max() > 1e-4
    got = jax.grad(lambda w: scores(w, True).values.sum())(w)
    want = jax.grad(lambda w: activation_norms(codes_of_all(x, w)).sum())(w)
    assert_allclose(got, want)
