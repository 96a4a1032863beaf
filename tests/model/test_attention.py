"""Backends of causal attention against the reference: values, gradients, memory, choice."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from aoe_jax.config.model import ModelConfig
from aoe_jax.errors import UserError
from aoe_jax.model.attention import backend_for, causal_attention
from aoe_jax.model.attention.blocks import KEPT_ATTENTION, MAX_BLOCKS, MIN_BLOCK
from aoe_jax.model.attention.cudnn import check as check_cudnn
from aoe_jax.model.attention.cudnn import cudnn_attention, is_cudnn_forward
from aoe_jax.model.attention.multi_head import (
    Attention,
    attend_to_cache,
    rotary,
    rotary_by_product,
    rotary_tables,
)
from aoe_jax.model.attention.reference import reference_attention
from aoe_jax.model.attention.splash import LANES, LONG, MAX_BLOCK, block_size
from tests.arrays import Device, assert_close, mesh_of, normal
from tests.runs import finish, start


def arrays(length, dtype, n_heads=3, n_kv=3, width=10):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (n_heads, n_kv, n_kv, n_heads)
    q, k, v, cotangent = (
        jax.random.normal(key, (2, n, length, width), dtype)
        for key, n in zip(keys, heads, strict=True)
    )
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.02, (2, length)), axis=1)
    return (q, k, v), cotangent, documents


blocks, splash = (partial(causal_attention, backend=name) for name in ("blocks", "splash"))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(attention, args, cotangent, segment_ids):
    y, pull_back = jax.vjp(lambda *a: attention(*a, segment_ids), *args)
    return y, *pull_back(cotangent)


def check(got, want, args, cotangent, documents, tolerance):
    got = value_and_gradients(got, args, cotangent, documents)
    assert {a.dtype for a in got} == {cotangent.dtype}
    args, cotangent = jax.tree.map(
        lambda a: a.astype(jnp.promote_types(a.dtype, "f4")), (args, cotangent)
    )
    assert_close(got, value_and_gradients(want, args, cotangent, documents), tolerance)


def test_the_reference_computes_what_jax_does():
    args, cotangent, documents = arrays(70, jnp.float32, 6, 2)

    def library(q, k, v, documents):
        mask = documents[:, None, :, None] == documents[:, None, None, :]
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True).swapaxes(1, 2)

    check(reference_attention, library, args, cotangent, documents, 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, MIN_BLOCK, MIN_BLOCK + 1, 300, MIN_BLOCK * MAX_BLOCKS + 72])
def test_blocks_compute_what_the_reference_does(x64, length, masked):
    args, cotangent, documents = arrays(length, jnp.float64, 4, 2)
    check(blocks, reference_attention, args, cotangent, documents if masked else None, 1e-12)


def test_blocks_in_bfloat16():
    check(blocks, reference_attention, *arrays(200, jnp.bfloat16), 0.03)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("length", "n_heads", "n_kv", "masked", "width"),
    [(256, 2, 2, False, 16), (200, 4, 2, True, 16), (200, 2, 1, True, LANES)],
)
def test_splash_computes_what_the_reference_does(length, n_heads, n_kv, masked, width):
    """In Pallas's interpreter. Some cases have padding to whole tiles, or grouped heads."""
    args, cotangent, documents = arrays(length, jnp.float32, n_heads, n_kv, width)
    check(splash, reference_attention, args, cotangent, documents if masked else None, 1e-5)


def test_splash_blocks_divide_every_length():
    sizes = {length: block_size(length) for length in range(LANES, LONG, LANES)}
    assert all(length % size == 0 and size <= MAX_BLOCK for length, size in sizes.items())
    assert sizes[2048] == 512 and sizes[1152] == 384 and sizes[128] == 128
    assert block_size(LONG) == 2 * MAX_BLOCK and block_size(LONG + LANES) == 5 * LANES


def test_no_probabilities_are_kept():
    """Of the 64 pairs of eight blocks, 28 are skipped, because all keys come after the queries. A
    layer on a mesh keeps no probabilities either.
    """
    length = MIN_BLOCK * MAX_BLOCKS
    args, cotangent, _ = arrays(length, jnp.float32)
    kept = jax.eval_shape(lambda *a: jax.vjp(blocks, *a)[1], *args)
    assert sum(a.size for a in jax.tree.leaves(kept)) <= 4 * cotangent.size + cotangent[..., 0].size
    flops = jax.jit(blocks).lower(*args).compile().cost_analysis()["flops"]
    products = 2 * 2 * cotangent.size * length * 36 / 64
    assert products < flops < 1.5 * products
    layer = Attention(ModelConfig(n_heads=2, d_model=16, dtype="float32"))
    x = jnp.zeros((8, 100, 16))
    params = layer.init(jax.random.key(0), x)
    for shape in ((8, 1, 1, 1), (1, 8, 1, 1)):
        with jax.set_mesh(mesh_of(*shape)):
            kept = jax.eval_shape(lambda p, x: jax.vjp(layer.apply, p, x)[1], params, x)
        of_heads = [a.shape for a in jax.tree.leaves(kept) if a.ndim == 4]
        assert not [s for s in of_heads if s[-1] >= MIN_BLOCK]


def test_attention_to_a_cache():
    """The newest positions have the outputs of a pass over the whole sequence."""
    (q, k, v), _, _ = arrays(20, jnp.float32, 4, 2)
    free = [(0, 0), (0, 0), (0, 7), (0, 0)]
    position = jnp.arange(15, 20)
    visible = jnp.broadcast_to(jnp.arange(27) <= position[:, None], (2, 5, 27))
    y = attend_to_cache(q[:, :, 15:], jnp.pad(k, free), jnp.pad(v, free), visible)
    assert_allclose(y, blocks(q, k, v)[:, :, 15:], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_by_a_product(dtype):
    """TPUs compute it this way; values and gradients are the same."""
    x, g = normal(0, (2, 2, 3, 20, 8), dtype)
    tables = [jnp.asarray(a, jnp.float32) for a in rotary_tables(20, ModelConfig(d_model=32))]
    want, want_back = jax.vjp(lambda x: rotary(x, *tables), x)
    got, got_back = jax.vjp(lambda x: rotary_by_product(x, *tables), x)
    atol = 1e-6 if dtype == "float32" else 0.03
    assert_allclose(got.astype("float32"), want.astype("float32"), atol=atol)
    (got_g,), (want_g,) = got_back(g), want_back(g)
    assert_allclose(got_g.astype("float32"), want_g.astype("float32"), atol=atol)


@pytest.mark.parametrize("attention", [blocks, splash])
def test_rematerialisation_keeps_what_the_backward_pass_needs(attention):
    """A policy keeps it by name, so that the forward pass is not computed again."""
    args, _, _ = arrays(128, jnp.float32, 2, 2, 16)
    keep = jax.checkpoint_policies.save_only_these_names(KEPT_ATTENTION)
    again = jax.checkpoint(attention, policy=keep)
    kept = jax.eval_shape(lambda *a: jax.vjp(again, *a)[1], *args)
    numbers = sum(a.size for a in jax.tree.leaves(kept) if a.shape[:2] == (2, 2))
    assert numbers == sum(a.size for a in args) + args[0].size + args[0][..., 0].size


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "dtype", "width", "want"),
    [
        ("cpu", "cpu", None, "bfloat16", 64, "blocks"),
        ("tpu", "TPU v5 lite", None, "float32", 10, "splash"),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 64, "cudnn"),
        ("gpu", "NVIDIA A100-SXM4-80GB", None, "bfloat16", 64, "cudnn"),
        ("gpu", "Tesla V100-SXM2-16GB", None, "bfloat16", 64, "blocks"),
        ("gpu", "Tesla T4", "7.5", "bfloat16", 64, "blocks"),
        ("gpu", "NVIDIA B200", "10.0", "float32", 64, "blocks"),
        ("gpu", "NVIDIA B200", "10.0", "bfloat16", 20, "blocks"),
    ],
)
def test_the_platform_chooses_the_backend(caplog, platform, kind, capability, dtype, width, want):
    device = Device(platform=platform, device_kind=kind, compute_capability=capability)
    with caplog.at_level("INFO"):
        assert backend_for(device, dtype, width) == want
    assert f"attention backend on {kind}: {want}" in caplog.text
    falls_back = want == "blocks" and kind.startswith("NVIDIA")
    assert ("which is slower" in caplog.text) == falls_back


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("flash", "float32", "attention backend='flash' is unknown; use auto, blocks or splash"),
        ("cudnn", "bfloat16", "backend='cudnn' does not run on platform 'cpu'; use auto"),
        ("splash", "float16", "attention backend='splash' with float16: use bfloat16 or float32"),
    ],
)
def test_backends_refuse_what_they_lack(backend, dtype, message):
    args, _, _ = arrays(4, dtype)
    with pytest.raises(UserError, match=message):
        causal_attention(*args, backend=backend)
    with pytest.raises(UserError, match="'cudnn' with float32: use bfloat16 or float16"):
        check_cudnn("float32", 64)
    with pytest.raises(UserError, match="heads of width 10: use a multiple of 8 up to 128"):
        check_cudnn("bfloat16", 10)


# JAX traces cuDNN's kernels only where it finds cuDNN, through the plugin for CUDA.
WITH_CUDNN = """
import json, sys, types
versions = types.ModuleType("versions")
versions.cudnn_get_version = lambda: 90000
sys.modules["jaxlib.cuda._versions"] = versions  # before JAX looks for it
from tests.model.test_attention import cudnn_calls
print(json.dumps([cudnn_calls(64, masked=False), cudnn_calls(63, masked=True)]))
"""


def cudnn_calls(length, masked):
    """How often the traced gradient has the forward kernel: without rematerialisation, with
    `is_cudnn_forward` kept, and with nothing kept.
    """
    args, _, documents = arrays(length, jnp.bfloat16, 4, 2, 64)
    attention = partial(cudnn_attention, segment_ids=documents if masked else None)
    policies = is_cudnn_forward, jax.checkpoint_policies.nothing_saveable
    found = []
    for form in (attention, *(jax.checkpoint(attention, policy=policy) for policy in policies)):
        jaxpr = jax.make_jaxpr(lambda *a, form=form: jax.vjp(form, *a)[1](form(*a)))(*args)
        found.append(str(jaxpr).count("dot_product_attention_fwd_wrapper["))
    return found


@pytest.mark.slow
def test_rematerialisation_keeps_what_cudnn_needs():
    status, stdout, stderr = finish(start(["-c", WITH_CUDNN], forked=False))
    assert status == 0, stderr
    for once, kept, nothing in json.loads(stdout.splitlines()[-1]):
        assert once > 0 and kept == once and nothing == once + 1


def test_shapes_that_do_not_fit():
    (q, k, v), _, _ = arrays(4, jnp.float32)
    no_positions = [a[:, :, :0] for a in (q, k, v)]
    no_heads = q, k[:, :0], v[:, :0]
    shapes = (q, k[:, :2], v[:, :2]), no_heads, no_positions, (q[0], k[0], v[0])
    dtypes = (q, k.astype("bfloat16"), v), [a.astype("int32") for a in (q, k, v)]
    for wrong in (*shapes, *dtypes, (q, k, v, jnp.zeros(1, jnp.int32))):
        given = ", ".join(f"{a.dtype}{a.shape}" for a in wrong)
        with pytest.raises(ValueError, match=f"one floating-point .*; got {re.escape(given)}$"):
            causal_attention(*wrong)
