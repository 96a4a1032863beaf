"""SMEAR: merged experts by plain loops, and what merging must be and must not be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.methods.smear import Smear, drop_experts, merge, merged_experts, near_copies
from aoe_jax.model.decoder import Decoder
from aoe_jax.model.decoding import check_decodes
from aoe_jax.moe.experts import single_expert
from aoe_jax.moe.layer import parameters_of
from aoe_jax.moe.reference import aoe_scores
from configs import methods
from tests.arrays import assert_finite, normal
from tests.methods.method_layers import by_loops
from tests.moe.contexts import context

SEQUENCES, TOKENS, WIDTH, EXPERTS = 3, 12, 8, 4
FORMS = {"router": {}, "aoe": {"factorised_gate": True, "d_wide": 8}}


def shapes_of(layer):
    """The shapes of the parameters by name."""
    sizes = layer.experts.sizes(WIDTH)
    return {
        name: parameter.shape(sizes)
        for name, parameter in parameters_of(layer.experts, layer.routing).items()
    }


def make(form="router", dtype="float32", recompute=False, training=False, **settings):
    """The layer, parameters that differ from the initial ones, and tokens."""
    layer = ExpertsLayer(
        ExpertsConfig(kind="smear", n_experts=EXPERTS, top_k=1, d_ffn=8, d_low=4, **FORMS[form]),
        routing=Smear(**{"segment": 4} | settings),
        dtype=jnp.dtype(dtype),
        remat="experts" if recompute else "none",
        training=training,
    )
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(SEQUENCES, TOKENS, WIDTH)), dtype)
    params = {
        name: jnp.asarray(0.5 * draw(size=shape), dtype) for name, shape in shapes_of(layer).items()
    }
    return layer, params, x


def layer_norm(a):
    return (a - a.mean(axis=-1, keepdims=True)) / np.sqrt(a.var(axis=-1, keepdims=True) + 1e-5)


def softmax(p):
    e = np.exp(p - p.max())
    return e / e.sum()


def by_loop(params, x, segment, real):
    """Outputs, and the weights of the segments, in NumPy."""
    w = {name: np.asarray(a) for name, a in params.items()}
    x, y, weights = np.asarray(x), np.zeros(x.shape), []
    for b in range(x.shape[0]):
        for first in range(0, x.shape[1], segment or x.shape[1]):
            own = slice(first, first + segment if segment else None)
            decides = slice(first - segment, first) if segment else own
            p = np.full(EXPERTS, 1 / EXPERTS)
            if not segment or first > 0:
                counted = x[b, decides][real[b, decides]]
                v = counted.mean(axis=0) if len(counted) else np.zeros(x.shape[2])
                if "w_gate_down" in w:
                    scores = [np.linalg.norm(v @ w["w_gate_down"][i]) for i in range(EXPERTS)]
                else:
                    columns = layer_norm(w["w_router"].T) * w["router_scale"]
                    pooled = layer_norm(v) * w["pooled_scale"] + w["pooled_bias"]
                    scores = columns @ pooled + w["expert_bias"]
                p = softmax(np.array(scores))
            names = ("w_gate_down", "w_gate_up", "w_gate", "w_up", "w_down")
            merged = {name: np.tensordot(p, w[name], 1) for name in names if name in w}
            t = x[b, own]
            gate = t
            for name in ("w_gate_down", "w_gate_up") if "w_gate_down" in w else ("w_gate",):
                gate = gate @ merged[name]
            y[b, own] = (gate / (1 + np.exp(-gate)) * (t @ merged["w_up"])) @ merged["w_down"]
            weights.append(p)
    return y, np.array(weights)


# 5 does not divide the tokens, so the last segment is shorter. 0: whole sequences.
@pytest.mark.parametrize("segment", [4, 5, 0])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_a_loop(x64, form, segment):
    layer, params, x = make(form, "float64", segment=segment)
    real = np.ones((SEQUENCES, TOKENS), bool)
    # Padding does not count; the mean token of a segment of nothing else is zero.
    real[1, 2:] = real[2, 4:8] = False
    y, stats = jax.jit(layer.apply)({"params": params}, x, jnp.asarray(real, float))
    want, weights = by_loop(params, x, segment, real)
    assert_allclose(y, want, atol=1e-10)
    starts = np.arange(0, TOKENS, segment or TOKENS)
    counts = np.add.reduceat(real, starts, axis=1).ravel()
    assert_allclose(stats.load, counts @ weights / counts.sum(), atol=1e-10)
    entropy = -(weights * np.log(weights)).sum(axis=1)
    assert_allclose(stats.confidence_entropy, counts @ entropy / counts.sum(), atol=1e-10)
    assert weights.std(axis=0).max() > 0.03


@pytest.mark.parametrize("form", FORMS)
def test_what_a_merged_expert_is(x64, form):
    """With all weight on one expert it is that expert. With equal experts weights do not matter.
    Otherwise its output is not the mean of the experts' outputs.
    """
    _, params, x = make(form, "float64")
    of_experts = {name: w for name, w in params.items() if w.ndim == 3}
    tokens, uneven = x[0], jnp.array([0.1, 0.2, 0.3, 0.4])
    for expert in range(EXPERTS):
        one_hot = jnp.eye(EXPERTS)[expert]
        want = by_loops(params, tokens, jnp.broadcast_to(one_hot, (TOKENS, EXPERTS)))
        assert_allclose(merged_experts(tokens, one_hot, of_experts), want, atol=1e-12)
    equal = {name: jnp.broadcast_to(w[:1], w.shape) for name, w in of_experts.items()}
    want = merged_experts(tokens, jnp.eye(EXPERTS)[0], equal)
    assert_allclose(merged_experts(tokens, uneven, equal), want, atol=1e-12)
    merged = merged_experts(tokens, uneven, of_experts)
    ensemble = by_loops(params, tokens, jnp.broadcast_to(uneven, (TOKENS, EXPERTS)))
    assert jnp.abs(merged - ensemble).max() > 0.1 * jnp.abs(ensemble).max()


def test_linear_experts_merge_to_their_mean_output(x64):
    w = normal(0, (EXPERTS, WIDTH, 5))
    x, p = normal(1, (TOKENS, WIDTH)), jnp.array([0.1, 0.2, 0.3, 0.4])
    want = jnp.einsum("n,td,ndf->tf", p, x, w)
    assert_allclose(x @ merge(p, {"w": w})["w"], want, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_merging_takes_no_parameters(form):
    """Experts have the shapes of those of a layer that chooses among them."""

    def of_experts(layer):
        return {name: shape for name, shape in shapes_of(layer).items() if len(shape) == 3}

    layer, *_ = make(form)
    config = dataclasses.replace(layer.experts, kind=form, factorised_gate=False)
    assert of_experts(layer) == of_experts(ExpertsLayer(config))


@pytest.mark.parametrize("form", FORMS)
def test_every_expert_and_the_router_have_a_gradient(form):
    layer, params, x = make(form)
    gradient = jax.jit(jax.grad(lambda p: (layer.apply({"params": p}, x)[0] ** 2).sum()))(params)
    for name, g in gradient.items():
        of_expert = np.abs(g).reshape(EXPERTS, -1).sum(axis=1) if g.ndim == 3 else np.abs(g).sum()
        assert np.all(of_expert > 0) and np.isfinite(of_expert).all(), name


def test_a_sequence_of_zeros_has_a_finite_gradient():
    layer, params, x = make("aoe")
    gradient = jax.jit(jax.grad(lambda p, x: layer.apply({"params": p}, x)[0].sum(), (0, 1)))(
        params, jnp.zeros_like(x)
    )
    assert_finite(gradient)


@pytest.mark.parametrize("segment", [4, 0])
def test_sequences_do_not_depend_on_each_other(segment):
    layer, params, x = make(segment=segment)
    apply = jax.jit(lambda x: layer.apply({"params": params}, x)[0])
    y, order = apply(x), jnp.array([2, 0, 1])
    assert_allclose(apply(x[order]), y[order], atol=1e-5)
    assert_allclose(jax.jit(layer.apply)({"params": params}, x[0])[0], y[0], atol=1e-5)


def test_which_tokens_decide_for_a_segment():
    """With whole sequences all tokens do. With segments those of the segment before do, and none
    for the first segment.
    """

    def changed(segment, at):
        layer, params, x = make(segment=segment)
        apply = jax.jit(lambda a: layer.apply({"params": params}, a)[0][0])
        y, z = (apply(a) for a in (x, x.at[0, at].multiply(3.0)))
        return np.flatnonzero(np.abs(y - z).max(axis=-1) > 1e-5).tolist()

    assert changed(0, 5) == list(range(TOKENS))
    assert changed(4, 5) == [5, 8, 9, 10, 11]
    assert changed(4, 9) == [9]


def test_experts_are_dropped_in_training_only():
    layer, params, x = make(training=True, expert_dropout=0.5)
    apply = jax.jit(
        lambda layer, key: layer.apply({"params": params}, x, rngs={"experts": key})[0],
        static_argnums=0,
    )
    outputs = [apply(layer, jax.random.key(i)) for i in (0, 0, 1)]
    assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3
    trained = layer.clone(training=False)
    outputs = [apply(trained, jax.random.key(i)) for i in (0, 1)]
    assert_array_equal(*outputs)


def test_dropped_experts_have_no_weight():
    p = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    kept = jnp.array([[True, False, True, True], [True] * 4, [False] * 4])
    want = [[0.125, 0, 0.375, 0.5], [0.25] * 4, [0.25] * 4]
    assert_allclose(drop_experts(p, kept), want, atol=1e-6)


def test_how_often_an_expert_is_kept():
    ctx = context(jnp.zeros((1, EXPERTS)), training=True, rng=jax.random.key(0))
    kept = Smear(expert_dropout=0.1)._kept(ctx, (500, 5), EXPERTS)
    assert kept.shape == (500, 5, EXPERTS) and abs(kept.mean() - 0.9) < 0.01


def test_bfloat16():
    layer, params, x = make("aoe", "bfloat16")
    y, stats = jax.jit(layer.apply)({"params": params}, x)
    apply_exact = jax.jit(layer.clone(dtype=jnp.float32).apply)
    exact = apply_exact({"params": params}, x.astype(jnp.float32))[0]
    assert y.dtype == jnp.bfloat16 and stats.load.dtype == jnp.float32
    assert_allclose(np.asarray(y, float), exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_experts_start_near_each_other():
    w = near_copies(0.25)(jax.random.key(0), (8, 64, 64))
    assert_allclose(w.var(), 1 / 64, rtol=0.05)
    assert_allclose((w - w.mean(axis=0)).var() * 8 / 7, 0.25 / 64, rtol=0.05)
    one = merge(jnp.eye(8)[0], {"w_gate": w, "w_up": w, "w_down": w})
    assert np.isfinite(single_expert(jnp.ones((1, 64)), one)).all()


def test_a_decoder_cannot_decode_token_by_token():
    config = Config.from_config_dict(methods.get_config("smear"))
    message = (
        r"routing\.name='smear': cannot decode token by token: the expert of a segment is merged"
    )
    with pytest.raises(UserError, match=message):
        check_decodes(Decoder.from_config(config))


def test_scores_are_norms_of_the_mean_token():
    """They are not means of norms: two opposite tokens have a score of 0."""
    layer, params, x = make("aoe", segment=0)
    mean_score = jax.jit(lambda x: layer.apply({"params": params}, x)[1].mean_score)
    assert_allclose(mean_score(jnp.stack([x[0, 0], -x[0, 0]])[None]), 0, atol=1e-6)
    want = aoe_scores(x[0, :1], params["w_gate_down"])[0]
    assert_allclose(mean_score(jnp.stack([x[0, 0], x[0, 0]])[None]), want, rtol=1e-5)
