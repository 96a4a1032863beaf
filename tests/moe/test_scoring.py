"""Products of scores: for few tokens, in bfloat16, and ties of the largest activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.moe.scoring import (
    FEW_TOKENS,
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


@pytest.mark.parametrize("n_tokens", [1, FEW_TOKENS - 1, FEW_TOKENS])
def test_each_expert_times_each_token(n_tokens):
    x = normal(0, (n_tokens, 6))
    w_gate_down = normal(1, (5, 6, 3))
    want = [[token @ expert for expert in np.asarray(w_gate_down)] for token in np.asarray(x)]
    assert_allclose(codes_of_all(x, w_gate_down), want, rtol=1e-4, atol=1e-6)


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
