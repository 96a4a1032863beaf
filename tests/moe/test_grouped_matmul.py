"""Every backend against a plain loop, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul import BACKENDS, grouped_matmul
from aoe_jax.moe.grouped_matmul.blocked import row_layout
from aoe_jax.moe.grouped_matmul.groups import WholeGroups
from tests.arrays import assert_close, assert_equal

pytestmark = pytest.mark.smoke

GROUP_SIZES = {
    "random": [37, 5, 0, 120, 61, 1],
    "empty groups at both ends": [0, 0, 90, 0, 134, 0],
    "all rows in one group": [0, 224, 0, 0, 0, 0],
    "groups of one row": [1, 1, 1, 1, 1, 1],
    "rows past the last group": [10, 50, 3, 0, 7, 40],
    "no rows at all": [0, 0, 0, 0, 0, 0],
    # These go through the batched product of `blocked`: whole, with a rest for its blocks, with
    # rows of no group.
    "nearly equal": [42, 42, 33, 44, 29, 34],
    "one larger group": [60, 7, 37, 40, 30, 50],
    "nearly equal, rows past the last group": [31, 31, 33, 23, 46, 37],
}
BATCHED = list(GROUP_SIZES)[-3:]
M, D, F = 224, 24, 40
# One callable per backend, so that cases of one shape share a compilation. `mosaic_gpu` has its own
# tests.
PORTABLE = {
    name: partial(grouped_matmul, backend=name) for name in BACKENDS if name != "mosaic_gpu"
}


def reference(rows, weights, group_sizes, cotangent):
    """The value and the gradients in float64, by numpy."""
    rows, weights, cotangent = (np.asarray(a, float) for a in (rows, weights, cotangent))
    value, d_rows, d_weights = np.zeros(cotangent.shape), 0 * rows, 0 * weights
    start = 0
    for expert, size in enumerate(group_sizes):
        own = slice(start, start + size)
        value[own], d_rows[own] = rows[own] @ weights[expert], cotangent[own] @ weights[expert].T
        d_weights[expert], start = rows[own].T @ cotangent[own], start + size
    return value, d_rows, d_weights


def inputs(group_sizes, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    rows = jax.random.normal(keys[0], (M, D), dtype)
    weights = jax.random.normal(keys[1], (len(group_sizes), D, F), dtype)
    cotangent = jax.random.normal(keys[2], (M, F), dtype)
    return rows, weights, jnp.array(group_sizes, jnp.int32), cotangent


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, rows, weights, group_sizes, cotangent):
    value, pull_back = jax.vjp(lambda r, w: function(r, w, group_sizes), rows, weights)
    return value, *pull_back(cotangent)


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("case", GROUP_SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients(backend, case, dtype, tolerance):
    """Rows past the last group are NaN and do not affect the results."""
    rows, weights, group_sizes, cotangent = inputs(GROUP_SIZES[case], dtype)
    want = reference(rows, weights, GROUP_SIZES[case], cotangent)
    unused = jnp.arange(M)[:, None] >= group_sizes.sum()
    rows, cotangent = (jnp.where(unused, jnp.nan, a) for a in (rows, cotangent))
    got = value_and_gradients(PORTABLE[backend], rows, weights, group_sizes, cotangent)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("backend", PORTABLE)
def test_groups_of_all_rows(backend):
    rows, weights, group_sizes, cotangent = inputs(GROUP_SIZES["random"], "float32")
    run = partial(value_and_gradients, PORTABLE[backend], rows, weights)
    whole = run(WholeGroups(group_sizes), cotangent)
    assert_equal(whole, run(group_sizes, cotangent))


@pytest.mark.parametrize("n_experts", [1, 3, 64])
@pytest.mark.parametrize("m", [1, 7, 500, 2000])
def test_random_group_sizes(n_experts, m):
    rng = np.random.default_rng(n_experts * m)
    sizes = rng.multinomial(rng.integers(m + 1), rng.dirichlet(np.full(n_experts, 0.3)))
    rows = jnp.asarray(rng.standard_normal((m, 8)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((n_experts, 8, 4)), jnp.float32)
    got = jax.jit(PORTABLE["blocked"])(rows, weights, jnp.asarray(sizes, jnp.int32))
    assert_allclose(got, reference(rows, weights, sizes, np.zeros((m, 4)))[0], atol=1e-5)


def test_both_ways_of_blocked_are_tested():
    layouts = {case: row_layout(jnp.array(sizes), M) for case, sizes in GROUP_SIZES.items()}
    assert [case for case, layout in layouts.items() if layout.is_batched] == BATCHED


@pytest.mark.parametrize(("m", "d", "f"), [(0, 8, 4), (5, 8, 0)])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_nothing_to_do(backend, m, d, f):
    function = partial(grouped_matmul, backend=backend)
    rows, weights, sizes = jnp.ones((m, d)), jnp.ones((2, d, f)), jnp.zeros(2, jnp.int32)
    _, *gradients = value_and_gradients(function, rows, weights, sizes, jnp.ones((m, f)))
    assert gradients[1].shape == weights.shape and not gradients[1].any()


def test_bad_arguments_are_named():
    rows, weights, group_sizes, _ = inputs(GROUP_SIZES["random"], "float32")
    with pytest.raises(UserError, match="backend='dense' is unknown; use auto, blocked"):
        grouped_matmul(rows, weights, group_sizes, backend="dense")
    with pytest.raises(ValueError, match="rows \\[M, D\\]"):
        grouped_matmul(rows[:, :-1], weights, group_sizes)
    for sizes in (group_sizes[:-1], group_sizes.astype(jnp.float32)):
        with pytest.raises(ValueError, match="group sizes int32\\[6\\]; got"):
            grouped_matmul(rows, weights, sizes)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        grouped_matmul(rows, weights.astype(jnp.bfloat16), group_sizes)
