"""Tiles of the Megablox backend, and widths of several tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul import grouped_matmul, megablox_swiglu
from aoe_jax.moe.grouped_matmul.groups import WholeGroups
from aoe_jax.moe.grouped_matmul.megablox import MAX_ROWS, MAX_WIDTH, row_tile, tiles, width_tile
from aoe_jax.moe.swiglu import KEPT_EXPERTS, gate_pre_activations, swiglu
from tests.arrays import assert_close


@pytest.mark.parametrize(
    ("m", "n_experts", "tile"),
    [
        (131072, 8, 512),
        (32768, 8, 256),
        (32768, 64, 128),
        (131072, 1, 512),
        (8192 + 256, 1, 256),  # 512 does not divide it
        (32768 + 8, 1, 128),  # nothing divides it: padded
        (100, 8, 112),
        (1, 8, 16),
    ],
)
def test_row_tile(m, n_experts, tile):
    assert row_tile(m, n_experts) == tile


@pytest.mark.parametrize("limit", MAX_WIDTH.values())
@pytest.mark.parametrize(
    "width", [1, 64, 327, 400, 512, 513, 768, 1024, 1025, 1280, 3264, 4194, 4393, 6470]
)
def test_width_tile(width, limit):
    tile = width_tile(width, limit)
    assert tile == width or tile % 128 == 0
    assert tile <= limit
    assert -(-width // tile) * tile < 1.5 * width


@pytest.mark.parametrize("n_experts", [8, 64])
def test_shared_tiles_cost_a_sixteenth_at_most(n_experts):
    for m in (2**k for k in range(20)):
        tile = row_tile(m, n_experts)
        assert tile <= MAX_ROWS
        assert (n_experts - 1) * tile <= m / 16 or tile <= 128


def test_each_product_has_tiles_of_its_own():
    assert tiles(32768, 64, 4393, 8, 2) == {
        "forward": (256, 64, 4393),  # the whole width: rows are read once
        "d_rows": (256, 896, 64),
        "d_weights": (256, 64, 896),
    }
    # The whole depth: weights are read once, and as much of the width as there is room for.
    assert tiles(32768, 768, 3072, 8, 2)["d_rows"] == (256, 3072, 768)
    assert tiles(32768, 768, 3840, 8, 2)["d_rows"] == (256, 3840, 384)


def test_widths_of_several_tiles_with_a_remainder():
    """The kernel masks the remainder of a contraction and drops the remainder of an output."""
    m, d, f, sizes = 70, 520, 530, [13, 0, 40]
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (m, d)) / d**0.5
    weights, g = jax.random.normal(keys[1], (3, d, f)), jax.random.normal(keys[2], (m, f))
    (tm, tk, tn) = tiles(m, d, f, 3, 4)["forward"]
    assert m % tm and d % tk and f % tn

    sizes = jnp.array(sizes, jnp.int32)

    def value_and_gradients(backend):
        product = partial(grouped_matmul, groups=sizes, backend=backend)
        value, pull_back = jax.vjp(product, rows, weights)
        return value, *pull_back(g)

    assert_close(value_and_gradients("megablox"), value_and_gradients("ragged"), 1e-4)


def test_unsupported_dtype_is_named():
    with pytest.raises(UserError, match="megablox.*float16: use bfloat16 or float32"):
        ones = jnp.ones((2, 8, 8), "float16")
        grouped_matmul(ones[0], ones, jnp.zeros(2, jnp.int32), backend="megablox")


# m, d, f, group sizes, dtype, whether d and f have several tiles
CASES = {
    "remainders of d, rows of no expert": (70, 520, 530, [13, 0, 40], "float32", True, False),
    "two tiles of f with a remainder": (300, 64, 2200, [100, 150, 50], "float32", False, True),
    "one expert": (40, 1408, 96, [0, 40, 0], "float32", True, False),
    "bfloat16": (300, 300, 330, [120, 0, 150], "bfloat16", True, True),
}


SWIGLU = [pytest.param(case, True, marks=pytest.mark.slow) for case in CASES]
SWIGLU += [("bfloat16", False)]


@pytest.mark.parametrize(("case", "keeps_up"), SWIGLU)
def test_swiglu_in_kernels(case, keeps_up, monkeypatch):
    """Values and gradients are those of plain products, whatever is in rows of no expert. The
    gradients of rows from both projections are added in a kernel.
    """
    if case == "bfloat16":  # smaller tiles
        monkeypatch.setattr(megablox_swiglu, "MAX_WIDTH", {2: 128})
        monkeypatch.setattr(megablox_swiglu, "VMEM_BYTES", 2**20)
    m, d, f, sizes, dtype, *several = CASES[case]
    keys, n_rows = jax.random.split(jax.random.key(0), 6), sum(sizes)
    shapes = (m, d), (3, d, f), (3, d, f), (3, f, d), (m, d)
    arrays = [
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False)
    ]
    weight, groups = jax.random.uniform(keys[5], (m,)), jnp.array(sizes, jnp.int32)
    if n_rows == m:
        groups = WholeGroups(groups)
    *_, tk, tn = megablox_swiglu.tiles(m, d, f, 3, arrays[0].dtype.itemsize, 5)
    assert several == [tk < d, tn < f]

    def value_and_gradients(backend, elsewhere):
        rows, w_gate, w_up, w_down, g = arrays
        rows, g = (a.at[n_rows:].set(elsewhere) for a in (rows, g))

        def run(rows, weight, w_gate, w_up, w_down):
            w = {"w_gate": w_gate / d**0.5, "w_up": w_up / d**0.5, "w_down": w_down / f**0.5}
            w = {name: a.astype(dtype) for name, a in w.items()}
            gate, _, rows = gate_pre_activations(rows, groups, w, backend=backend)
            gate = gate.at[n_rows:].set(elsewhere)
            return swiglu(rows, gate, weight, groups, w, backend, keeps_up)

        value, pull_back = jax.vjp(run, rows, weight, w_gate, w_up, w_down)
        return value, *pull_back(g)

    tolerance = 1e-4 if dtype == "float32" else 0.02
    found = value_and_gradients("megablox", jnp.nan)
    assert_close(found, value_and_gradients("ragged", 0), tolerance)


@pytest.mark.parametrize("keeps_up", [True, False])
def test_what_swiglu_keeps_when_experts_are_recomputed(keeps_up):
    """There are five kernels: `x W_up` once, the derivative, and gradients of rows and weights."""
    shape = jax.ShapeDtypeStruct
    w = {"w_up": shape((2, 128, 256), "float32"), "w_down": shape((2, 256, 128), "float32")}
    arguments = shape((64, 128), "float32"), shape((64, 256), "float32"), shape((64,), "float32")

    def loss(rows, gate, weight, w):
        return swiglu(rows, gate, weight, jnp.array([32, 32]), w, "megablox", keeps_up).sum()

    policy = jax.checkpoint_policies.save_only_these_names(KEPT_EXPERTS)
    program = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2, 3))
    lowered = jax.jit(program).trace(*arguments, w).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("@tpu_custom_call") == 5  # the output of the experts is not needed


@pytest.mark.parametrize("gate", ["w_gate", "w_gate_down"])
def test_a_kernel_adds_gradients_of_rows(gate):
    """The rows are kept once."""
    rows, w = jnp.ones((64, 128)), {gate: jnp.ones((2, 128, 256)), "w_up": jnp.ones((2, 128, 256))}
    w |= {"w_gate_up": jnp.ones((2, 256, 256)), "w_down": jnp.ones((2, 256, 128))}

    def experts(rows):
        groups = WholeGroups(jnp.array([32, 32]))
        gate, _, rows = gate_pre_activations(rows, groups, w, backend="megablox")
        return swiglu(rows, gate, jnp.ones(64), groups, w, "megablox")

    _, kept = jax.vjp(experts, rows)
    assert sum(a.shape == rows.shape for a in jax.tree.leaves(kept)) == 1
    program = jax.make_jaxpr(jax.grad(lambda rows: experts(rows).sum()))(rows)
    assert str(program).count("name=gmm_add") == 2  # for TPU and for the interpreter
