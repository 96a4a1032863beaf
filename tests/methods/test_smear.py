"""SMEAR: merged experts by plain loops, dropped experts, and how experts start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.methods.smear import Smear, drop_experts, near_copies
from aoe_jax.moe.reference import l2_norm
from tests.methods.method_layers import assert_agree, make
from tests.moe.contexts import context

SHAPE, EXPERTS = (3, 12, 8), 4
FORMS = {"router": {}, "aoe": {"factorised_gate": True, "d_wide": 8}}


def make_smear(form, training=False, recompute=False, **settings):
    sizes = {"n_experts": EXPERTS, "top_k": 1, "d_ffn": 8} | FORMS[form]
    layer, params, x = make("smear", Smear(**settings), SHAPE, recompute, training, **sizes)
    return layer, {name: a * (3 if a.ndim == 3 else 10) for name, a in params.items()}, x


def layer_norm(a):
    return (a - a.mean(axis=-1, keepdims=True)) / jnp.sqrt(a.var(axis=-1, keepdims=True) + 1e-5)


def merging_weights(w, v):
    """By the mean token `v [d]`: `[n]`."""
    if "w_gate_down" in w:
        return jax.nn.softmax(l2_norm(jnp.einsum("d,ndr->nr", v, w["w_gate_down"])))
    columns = layer_norm(w["w_router"].T) * w["router_scale"]
    pooled = layer_norm(v) * w["pooled_scale"] + w["pooled_bias"]
    return jax.nn.softmax(columns @ pooled + w["expert_bias"])


def by_loop(w, x, segment, real):
    """Outputs, and the weights of the segments."""
    y, weights = [], []
    segment = segment or None
    for tokens, is_real in zip(x, real, strict=True):
        for first in range(0, SHAPE[1], segment or SHAPE[1]):
            own = slice(first, first + segment if segment else None)
            decides = slice(first - segment, first) if segment else own
            p = jnp.full(EXPERTS, 1 / EXPERTS)
            if not segment or first > 0:
                counted = tokens[decides][is_real[decides]]
                p = merging_weights(w, counted.sum(axis=0) / max(len(counted), 1))
            merged = {name: jnp.tensordot(p, a, 1) for name, a in w.items() if a.ndim == 3}
            gate = tokens[own]
            for name in ("w_gate_down", "w_gate_up") if "w_gate_down" in w else ("w_gate",):
                gate = gate @ merged[name]
            y.append((jax.nn.silu(gate) * (tokens[own] @ merged["w_up"])) @ merged["w_down"])
            weights.append(p)
    return jnp.concatenate(y).reshape(x.shape), jnp.stack(weights)


# 5 does not divide the tokens, so the last segment is shorter. 0: whole sequences.
@pytest.mark.parametrize(
    ("form", "segment"), [("aoe", 5), ("aoe", 0), ("router", 4), ("router", 5)]
)
def test_agrees_with_a_loop(x64, form, segment):
    layer, params, x = make_smear(form, recompute=segment == 5, segment=segment)
    real = np.ones(SHAPE[:2], bool)
    # Padding does not count; in a segment of padding the mean token is zero.
    real[1, 2:] = real[2, 4:8] = False

    @jax.jit
    def loop(params, x):
        return by_loop(params, x, segment, real)

    token_weights = real.astype(float)
    stats = assert_agree(layer, params, x, lambda *a: loop(*a)[0], token_weights=token_weights)
    weights = np.asarray(loop(params, x)[1])
    counts = np.add.reduceat(real, np.arange(0, SHAPE[1], segment or SHAPE[1]), axis=1).ravel()
    assert_allclose(stats.load, counts @ weights / counts.sum(), atol=1e-10)
    entropy = -(weights * np.log(weights)).sum(axis=1)
    assert_allclose(stats.confidence_entropy, counts @ entropy / counts.sum(), atol=1e-10)
    assert weights.std(axis=0).max() > 0.03


def test_experts_are_dropped_in_training_only():
    layer, params, x = make_smear("router", training=True, segment=4, expert_dropout=0.5)

    def outputs(layer):
        apply = jax.jit(
            lambda key: layer.apply({"params": params}, x, rngs={"experts": key})[0],
        )
        return [apply(jax.random.key(seed)) for seed in (0, 0, 1)]

    dropped, kept = outputs(layer), outputs(layer.clone(training=False))
    assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3
    assert_array_equal(kept[0], kept[2])


def test_dropped_experts_have_no_weight():
    p = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    kept = jnp.array([[True, False, True, True], [True] * 4, [False] * 4])
    want = [[0.125, 0, 0.375, 0.5], [0.25] * 4, [0.25] * 4]
    assert_allclose(drop_experts(p, kept), want, atol=1e-6)
    ctx = context(jnp.zeros((1, EXPERTS)), training=True, rng=jax.random.key(0))
    kept = Smear(expert_dropout=0.1)._kept(ctx, (500, 5), EXPERTS)
    assert kept.shape == (500, 5, EXPERTS) and abs(kept.mean() - 0.9) < 0.01


def test_experts_start_near_each_other():
    w = near_copies(0.25)(jax.random.key(0), (8, 64, 64))
    assert_allclose(w.var(), 1 / 64, rtol=0.05)
    assert_allclose((w - w.mean(axis=0)).var() * 8 / 7, 0.25 / 64, rtol=0.05)
