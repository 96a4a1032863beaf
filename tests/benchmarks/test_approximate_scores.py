"""Approximate choices of experts: exact at full rank, better with more work, exact norms for the
candidates.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.moe.routing import top_k
from benchmarks import approximate_scores as methods_of
from benchmarks.approximate_scores import agreement, choice_scores, relative_cost

T, D, N, R, K = 96, 24, 12, 16, 3
SKETCHES = {
    "random": methods_of.random_projection,
    "singular": lambda r, s, candidates=None: methods_of.principal(
        r, s, candidates, use_data=False
    ),
    "principal": methods_of.principal,
}


@pytest.fixture(scope="module")
def problem():
    """Tokens of uneven variance, and experts whose columns differ in size: `(x, w_down,
    covariance)`.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (T, D)) * jnp.linspace(0.2, 2, D)
    w_down = jax.random.normal(keys[1], (N, D, R)) * jnp.exp(jax.random.normal(keys[2], (N, 1, R)))
    return x, w_down / D**0.5, x.T @ x / T


def scores_of(method, problem, bias=None):
    x, w_down, covariance = problem
    return choice_scores(
        method, x, w_down, method.prepare(w_down, method.find(w_down, covariance)), K, bias
    )


def overlap_with_exact(method, problem, bias=None):
    exact, found = (
        top_k(scores_of(m, problem, bias), K, bias=bias).expert.reshape(T, K)
        for m in (methods_of.exact(), method)
    )
    return float(agreement(exact, found)[0].mean())


def test_agreement_counts_sets():
    chosen = jnp.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    other = jnp.array([[2, 0, 1], [3, 9, 4], [0, 1, 2]])
    overlap, identical = agreement(chosen, other)
    np.testing.assert_allclose(overlap, [1, 2 / 3, 0], rtol=1e-6)
    assert identical.tolist() == [True, False, False]


@pytest.mark.parametrize("sketch", SKETCHES)
def test_full_rank_is_exact(sketch, problem):
    method = SKETCHES[sketch](R, R)
    np.testing.assert_allclose(
        scores_of(method, problem), scores_of(methods_of.exact(), problem), rtol=1e-5
    )
    assert overlap_with_exact(method, problem) == 1 and relative_cost(method, N, K) == 1


@pytest.mark.parametrize("sketch", SKETCHES)
def test_candidates_have_exact_norms(sketch, problem):
    scores = np.asarray(scores_of(SKETCHES[sketch](R, 4, 2), problem))
    candidates = np.isfinite(scores)
    assert (candidates.sum(axis=1) == 2 * K).all() and (scores[~candidates] == -np.inf).all()
    exact = np.asarray(scores_of(methods_of.exact(), problem))
    np.testing.assert_allclose(scores[candidates], exact[candidates], rtol=1e-5)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_more_candidates_find_more(sketch, problem):
    overlaps = [
        overlap_with_exact(SKETCHES[sketch](R, 4, candidates), problem)
        for candidates in (None, 2, 3, N)
    ]
    assert overlaps == sorted(overlaps) and overlaps[0] < overlaps[-1] == 1


def test_principal_directions_estimate_best(problem):
    """By mean squared error of the squared norms; the mean of the directions left out is part of
    the estimate.
    """
    exact = scores_of(methods_of.exact(), problem) ** 2
    errors = [
        float(((scores_of(make(R, 4), problem) ** 2 - exact) ** 2).mean())
        for make in SKETCHES.values()
    ]
    assert errors == sorted(errors, reverse=True)
    estimates = scores_of(methods_of.principal(R, 4), problem)
    np.testing.assert_allclose((estimates**2).mean(axis=0), exact.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "error", "least"),
    [("bfloat16", 0.005, 0.98), ("int8", 0.02, 0.98), ("float8", 0.05, 0.9)],
)
def test_rounded_operands(name, error, least, problem):
    method = getattr(methods_of, name)()
    exact, estimates = scores_of(methods_of.exact(), problem), scores_of(method, problem)
    assert float(jnp.abs(estimates / exact - 1).mean()) < error
    assert overlap_with_exact(method, problem) >= least


def test_zero_tokens_and_columns(problem):
    x, w_down, covariance = problem
    zeros = x.at[0].set(0), w_down.at[0, :, 0].set(0), covariance
    for method in (methods_of.int8(), methods_of.float8(), methods_of.principal(R, 4, 2)):
        scores = np.asarray(scores_of(method, zeros))
        assert not np.isnan(scores).any() and (np.isneginf(scores[0]) | (scores[0] == 0)).all()


def test_bias_takes_part_in_both_stages(problem):
    """An expert that only the bias puts among the first K is a candidate, and is chosen."""
    bias = jnp.zeros(N).at[5].set(1e3)
    method = methods_of.principal(R, 4, 2)
    chosen = top_k(scores_of(method, problem, bias), K, bias=bias).expert.reshape(T, K)
    assert (chosen == 5).any(axis=1).all() and overlap_with_exact(method, problem, bias) > 1 / K


def test_effective_rank():
    eigenvalues = jnp.array([[4.0, 4, 4, 4, 0, 0], [2, 0, 0, 0, 0, 0]])
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (6, 6)))[0]
    moments = (rotation * eigenvalues[:, None]) @ rotation.T
    np.testing.assert_allclose(methods_of.effective_rank(moments), [4, 1], rtol=1e-5)


def test_costs():
    assert relative_cost(methods_of.int8(), 64, 8) == 0.5
    assert relative_cost(methods_of.principal(64, 16, 2), 64, 8) == 0.25 + 0.25
    assert next(iter(methods_of.methods(64))) == "exact"
