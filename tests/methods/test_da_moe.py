"""Experts per token from attention: known measures and counts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import AoELayer, Decoder
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.methods.da_moe import DAMoE, best, concentration, experts_of, head_importance
from aoe_jax.model.attention.multi_head import Attention, rotary, rotary_tables
from tests.arrays import mesh_of, normal
from tests.config.refused import check_refused
from tests.methods.method_layers import small_config

K_MAX = 4
CAUSAL = jnp.tril(jnp.ones((6, 6), bool))


def test_paying_all_tokens_alike_is_one_expert_at_every_position():
    n = jnp.arange(1, 2000)
    assert_array_equal(experts_of(concentration(1 / n, n), K_MAX), 1)


def test_paying_one_token_alone_is_every_expert():
    n = jnp.arange(2, 2000)
    assert_array_equal(experts_of(concentration(jnp.ones(1998), n), K_MAX), K_MAX)
    assert_array_equal(concentration(jnp.ones(1), 1), 0)  # it sees itself only


def test_more_attention_to_one_token_is_more_experts():
    found = experts_of(concentration(jnp.linspace(0.1, 1, 91), 10), K_MAX)
    assert (np.diff(found) >= 0).all() and set(found.tolist()) == {1, 2, 3, 4}
    assert_array_equal(
        experts_of(jnp.array([0.0, 0.25, 0.2501, 0.5, 0.75, 0.7501, 1]), 4), [1, 1, 2, 2, 3, 4, 4]
    )


@pytest.mark.slow
def test_attention_paid_is_causal():
    """The last query affects earlier tokens neither by value nor by gradient."""
    logits = normal(0, (1, 2, 6, 6))

    def importance(last):
        scores = jnp.where(CAUSAL, logits.at[:, :, 5].set(last), -jnp.inf)
        peaks = jax.nn.softmax(scores).max(axis=-1)
        return concentration(peaks, jnp.arange(1, 7))[0].mean(axis=0)

    last = logits[:, :, 5]
    moved, stayed = importance(last + jnp.arange(6)), importance(last)
    assert_array_equal(moved[:5], stayed[:5])
    assert moved[5] != stayed[5]
    slopes = jax.jacobian(importance)(last)
    assert not slopes[:5].any() and jnp.abs(slopes[5]).max() > 1e-4


def test_weights_are_the_softmax_over_the_count_best_scores():
    scores = normal(0, (40, 6))
    count = np.arange(40) % 3 + 1
    found = best(scores, count, 3)
    expert, weight = (np.asarray(a).reshape(40, 3) for a in (found.expert, found.weight))
    for row, n, experts, weights in zip(np.asarray(scores), count, expert, weight, strict=True):
        order = np.argsort(-row)[:n]
        assert_array_equal(experts, [*order, *[6] * (3 - n)])
        assert_allclose(weights[:n], np.exp(row[order]) / np.exp(row[order]).sum(), rtol=1e-5)
        assert_array_equal(weights[n:], 0)
    gradient = jax.grad(lambda s: (best(s, count, 3).weight ** 2).sum())(scores)
    assert np.isfinite(gradient).all() and gradient.any()


def attention(masked):
    """`(layer, parameters, x [4, 16, d], documents)` of attention that captures the importance."""
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=16, dtype="float32")
    layer = Attention(config, head_importance)
    x = 3 * normal(0, (4, 16, 16))
    documents = jnp.arange(16)[None].repeat(4, 0) // 5 if masked else None
    return layer, layer.init(jax.random.key(1), x), x, documents


@pytest.mark.parametrize("masked", [False, True])
def test_importance_by_each_head(masked):
    """`(N p - 1) / (N - 1)` of the N keys of the token's document, `[B, S, H]`, on a mesh that
    splits heads too; without a gradient.
    """
    layer, params, x, documents = attention(masked)
    y, found, _ = jax.jit(layer.apply)(params, x, documents)
    assert found.shape == (4, 16, 4) and found.dtype == jnp.float32
    w = params["params"]
    q, k = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in "qk")
    tables = rotary_tables(16, layer.config)
    q, k = rotary(q, *tables), jnp.repeat(rotary(k, *tables), 2, axis=1)
    visible = np.tril(np.ones((16, 16), bool))
    if masked:
        visible = visible & np.asarray(documents[0][:, None] == documents[0])
    scores = np.einsum("bhqi,bhki->bhqk", np.float64(q), np.float64(k)) / 2
    p, n = jax.nn.softmax(np.where(visible, scores, -np.inf)), visible.sum(axis=-1)
    want = np.where(n > 1, (n * p.max(axis=-1) - 1) / np.maximum(n - 1, 1), 0).swapaxes(1, 2)
    assert_allclose(found, want, atol=1e-5)
    assert (found[:, 0] == 0).all() and 0.05 < float(found[:, 1:].mean()) < 0.95
    assert not jax.grad(lambda x: layer.apply(params, x, documents)[1].sum())(x).any()
    mesh = mesh_of(1, 2, 2, 2)
    with jax.set_mesh(mesh):
        of_mesh = jax.jit(layer.apply)(params, x, documents)
    assert_allclose(of_mesh[0], y, atol=1e-5)
    assert_allclose(of_mesh[1], found, atol=1e-5)


@pytest.mark.slow
def test_importance_with_a_cache():
    """It is that of a whole pass, in the first piece and in the next."""
    layer, params, x, _ = attention(masked=False)
    *want, _ = layer.apply(params, x)
    *first, cache = layer.apply(params, x[:, :12], with_cache=True)
    cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 7), (0, 0))), cache)
    *rest, _ = layer.apply(params, x[:, 12:], cache, jnp.full(4, 12), method="extend")
    for a, b, c in zip(first, rest, want, strict=True):
        assert_allclose(jnp.concatenate([a, b], axis=1), c, atol=1e-5)


def decoder_of(kind, name, top_k):
    experts, routing = {"kind": kind, "top_k": top_k}, {"name": name}
    return Decoder.from_config(small_config(experts=experts, routing=routing))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_one_slot_is_top_1(ragged, kind):
    """The same parameters give the same logits and load."""
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    decoders = [decoder_of(kind, name, top_k=1) for name in ("da_moe", "top_k")]
    params = jax.jit(decoders[0].init)(jax.random.key(0), tokens)
    found, want = (jax.jit(decoder.apply)(params, tokens) for decoder in decoders)
    assert_allclose(found[0], want[0], atol=1e-5)
    assert_array_equal(found[1].load, want[1].load)


@pytest.mark.slow
def test_tokens_of_a_decoder_have_different_numbers_of_experts(ragged):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    decoder = decoder_of("aoe", "da_moe", top_k=4)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)
    params["params"]["layers"]["attention"]["q"] *= 6.0
    per_token = jax.jit(decoder.apply)(params, tokens)[1].load.sum(axis=1)
    assert ((per_token > 1.2) & (per_token < 3.8)).all()


REFUSED = """
routing.measure=received; routing.name=da_moe => routing.measure is unknown ... known are reduce
routing.reduce=sum; routing.name=da_moe => choose one of mean, max
routing.reduce=max => routing.reduce is unknown ... known are norm_topk_prob
by_attention.reduce=max => by_attention is gone ... set config.routing, with routing.name='da_moe'
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    check_refused(case)


def test_a_layer_needs_attention():
    layer = AoELayer(ExpertsConfig(n_experts=4, d_ffn=24, d_low=4), routing=DAMoE())
    with pytest.raises(ValueError, match="router 'da_moe' works only in a decoder"):
        layer.init(jax.random.key(0), jnp.zeros((3, 8)))
