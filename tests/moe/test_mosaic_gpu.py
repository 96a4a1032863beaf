"""The Hopper backend: what it refuses, when it is chosen, and its values and gradients in Pallas's
GPU interpreter.

The interpreter is public from JAX 0.12, and is run by the smoke suite there. `python -m
benchmarks.grouped_compile` compiles the kernels for a GPU.
"""

import logging
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul import _default_backend, _that_takes, grouped_matmul
from aoe_jax.moe.grouped_matmul.groups import WholeGroups
from aoe_jax.moe.grouped_matmul.mosaic_gpu import row_block, width_block
from tests.arrays import Device, assert_close

pytestmark = pytest.mark.smoke


def test_what_the_kernels_do_not_take_is_named():
    rows, weights, sizes = jnp.ones((8, 128)), jnp.ones((2, 128, 128)), jnp.zeros(2, int)
    with pytest.raises(UserError, match="float32: use bfloat16 or float16"):
        grouped_matmul(rows, weights, sizes, backend="mosaic_gpu")


def test_rows_of_two_products_are_kept_once():
    def run(rows, up, gate):
        product = partial(grouped_matmul, groups=groups, backend="mosaic_gpu")
        return product(rows, up) * product(rows, gate)

    rows, weights = jnp.ones((256, 64), "bfloat16"), jnp.ones((2, 64, 128), "bfloat16")
    groups = WholeGroups(jnp.array([128, 128]))
    shapes = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], rows, weights, weights)
    kept = [a.shape for a in jax.tree.leaves(shapes)]
    assert kept.count(rows.shape) == 1


def test_blocks():
    assert [row_block(m, 8) for m in (64, 16383, 16384)] == [64, 64, 128]
    assert [width_block(width) for width in (64, 128, 192, 768)] == [64, 128, 64, 128]


def test_no_array_of_zeros_is_kept_through_a_scan_over_layers(monkeypatch):
    """JAX moves constants out of a scan that has a gradient; then every layer reads them."""
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(core_count=4)])
    m, d, f = 256, 64, 128

    def loss(rows, up, down):
        def layer(x, weights):
            sizes = 100 * (x[:2, 0] > 0).astype(jnp.int32)
            hidden = grouped_matmul(x, weights[0], sizes, backend="mosaic_gpu")
            return grouped_matmul(hidden, weights[1], sizes, backend="mosaic_gpu"), None

        return jax.lax.scan(layer, rows, (up, down))[0].astype(jnp.float32).sum()

    shapes = (m, d), (3, 2, d, f), (3, 2, f, d)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2
    taken = [[v.aval.shape for v in eqn.invars] for eqn in scans]
    assert taken[0].count((m, d)) == 1 and (m, f) not in taken[0] + taken[1]


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "backend"),
    [
        ("cpu", "cpu", None, "blocked"),
        ("tpu", "TPU v5 lite", None, "megablox"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", "blocked"),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", "mosaic_gpu"),
        ("gpu", "NVIDIA B200", "10.0", "blocked"),
        # The devices of a mesh have no capability.
        ("gpu", "NVIDIA A100-SXM4-80GB", None, "blocked"),
        ("gpu", "NVIDIA H100 80GB HBM3", None, "mosaic_gpu"),
        ("gpu", "NVIDIA GH200 480GB", None, "mosaic_gpu"),
        ("gpu", "NVIDIA GB200", None, "blocked"),
    ],
)
def test_default_backend(platform, kind, capability, backend, caplog):
    device = Device(platform=platform, device_kind=kind, compute_capability=capability)
    with caplog.at_level(logging.INFO):
        assert _default_backend(device) == backend
    assert f"grouped_matmul backend on {kind}: {backend}" in caplog.text


def test_hopper_says_when_it_is_slower(caplog):
    assert _that_takes("mosaic_gpu", "bfloat16") == "mosaic_gpu"
    assert not caplog.text
    _that_takes.cache_clear()
    assert _that_takes("mosaic_gpu", "float32") == "blocked"
    assert "float32: use bfloat16" in caplog.text
    assert "backend 'blocked', which is slower" in caplog.text
    assert _that_takes("megablox", "float16") == "blocked"


# Older versions of JAX have no public interpreter.
if jax.__version_info__ >= (0, 12):

    @pytest.mark.parametrize(
        ("sizes", "d", "f"),
        [
            ([37, 5, 0, 120, 61, 1], 64, 256),
            ([0, 0, 90, 0, 110, 0], 64, 256),
            ([1] * 6, 64, 256),
            ([60, 4, 0, 100, 50, 10], 50, 64),
            ([10, 50, 3, 0, 7, 40], 50, 135),
            ([0] * 6, 64, 256),
        ],
    )
    def test_values_and_gradients_in_the_interpreter(sizes, d, f, monkeypatch):
        """Against `ragged` in float32, with NaN past the last group. M and some widths are not
        multiples of a block; if all rows have an expert, the groups are whole.
        """
        from jax.experimental.pallas import mosaic_gpu as plgpu

        m, used, groups = 224, sum(sizes), jnp.array(sizes, jnp.int32)
        groups = WholeGroups(groups) if used == m else groups
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (m, d), (m, f), (6, d, f)
        rows, g, weights = map(partial(jax.random.normal, dtype="bfloat16"), keys, shapes)

        def value_and_gradients(backend, rows, weights, g):
            def function(r, w):
                return grouped_matmul(r, w, groups, backend=backend)

            value, pull_back = jax.vjp(function, rows, weights)
            return value, *pull_back(g)

        want = value_and_gradients("ragged", *(a.astype(jnp.float32) for a in (rows, weights, g)))
        with plgpu.force_gpu_interpret_mode(), monkeypatch.context() as patch:
            # The kernel asks for it.
            patch.setattr(jax, "devices", lambda *_: [SimpleNamespace(core_count=4)])
            got = value_and_gradients(
                "mosaic_gpu", rows.at[used:].set(jnp.nan), weights, g.at[used:].set(jnp.nan)
            )
        assert {a.dtype for a in got} == {jnp.dtype("bfloat16")}
        assert_close(got, want, 1e-2)
