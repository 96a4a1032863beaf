"""THOR: which experts are drawn and learn, and the loss that makes passes agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.methods.thor import (
    Thor,
    consistent_cross_entropy,
    draw_by_position,
    draw_expert,
    layer_key,
)
from aoe_jax.training.step import init_state, training_loss
from aoe_jax.training.step_times import random_batch
from tests.arrays import normal
from tests.methods.method_layers import (
    by_loops,
    make,
    small_config,
    with_gradients,
)
from tests.model.test_vocabulary import check_chunks, inputs, plain

SHAPE, EXPERTS = (3, 12, 8), 4
FORMS = {"router": {}, "aoe": {"factorised_gate": True, "d_wide": 8}}


def make_thor(form="router", training=False, **settings):
    sizes = {"n_experts": EXPERTS, "top_k": 1, "d_ffn": 8} | FORMS[form]
    return make("thor", Thor(**settings), SHAPE, training=training, **sizes)


def experts_of(y, params, x):
    """The expert of every token, `[B, S]`."""
    one_hot = jnp.eye(EXPERTS)[:, None, None] * jnp.ones((*SHAPE[:2], 1))
    outputs = jnp.stack([by_loops(params, x, weights) for weights in one_hot])
    distance = jnp.abs(outputs - y).max(axis=-1)
    assert distance.min(axis=0).max() < 1e-5
    return np.asarray(distance.argmin(axis=0))


@pytest.mark.parametrize("form", FORMS)
def test_in_training_one_expert_takes_the_batch_and_learns(form):
    layer, params, x = make_thor(form, training=True)
    seen = set()

    @jax.jit
    def step(key):
        def apply(params, x):
            return layer.apply({"params": params}, x, rngs={"experts": key})

        return with_gradients(apply, params, x)

    for seed in range(8):
        (gradients, _), (y, stats) = step(jax.random.key(seed))
        (expert,) = set(experts_of(y, params, x).ravel())
        for g in gradients.values():
            assert_array_equal(np.abs(g).sum(axis=(1, 2)) > 0, np.arange(EXPERTS) == expert)
        seen.add(expert)
    assert len(seen) > 1
    assert_allclose(stats.load, 1 / EXPERTS)
    assert_allclose(stats.confidence_entropy, np.log(EXPERTS), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_draws_of_tokens_at_inference_depend_on_layer_and_position(ragged, form):
    layer, params, x = make_thor(form, inference="token")

    @jax.jit
    def apply(x, layer_index, positions):
        return layer.apply({"params": params}, x, layer_index=layer_index, positions=positions)[0]

    seen = set()
    for number in range(3):
        want = draw_by_position(layer_key(0, number), jnp.arange(SHAPE[1]), EXPERTS)
        y = apply(x, number, None)
        assert_array_equal(experts_of(y, params, x), np.broadcast_to(want, SHAPE[:2]))
        seen.add(tuple(want.tolist()))
    assert len(seen) == 3
    later = jnp.broadcast_to(jnp.arange(5, 12), (SHAPE[0], 7))
    assert_allclose(apply(x[:, 5:], 2, later), y[:, 5:], atol=1e-6)


def test_sequences_at_inference_draw_one_expert_per_layer():
    layer, params, x = make_thor(inference="sequence")
    apply = jax.jit(lambda i: layer.apply({"params": params}, x, layer_index=i)[0])
    drawn = [[int(draw_expert(layer_key(seed, i), EXPERTS)) for i in range(12)] for seed in (0, 1)]
    for number, expert in enumerate(drawn[0]):
        assert (experts_of(apply(number), params, x) == expert).all()
    assert len(set(drawn[0])) > 1 and drawn[0] != drawn[1]


@pytest.fixture(scope="module")
def small_model():
    """Parameters, and `(params, key) -> ((loss, metrics), gradient)` of a training step."""
    config = small_config(
        experts={"kind": "thor", "top_k": 1},
        balance={"aux_weight": 0.0},
        data={"seq_len": 8},
        train={"batch_size": 4},
    )
    batch, params = random_batch(config), jax.jit(lambda: init_state(config, 0).params)()

    def loss(params, key):
        return training_loss(config, params, {}, batch, jax.random.key(key))

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_equal_experts_agree(small_model):
    params, step = small_model
    layers = params["layers"]
    experts = jax.tree.map(lambda w: jnp.broadcast_to(w[:, :1], w.shape), layers["experts"])
    (loss, metrics), _ = step(params | {"layers": layers | {"experts": experts}}, 0)
    assert_allclose(metrics["divergence"], 0, atol=1e-6)
    assert_allclose(loss, 2 * metrics["nll"], rtol=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_step(small_model):
    """The two passes draw separately in every layer, only drawn experts learn, and alpha is the
    weight of the divergence.
    """
    params, step = small_model
    sharper, drawn = jax.tree.map(lambda a: 2 * a, params), []
    for key in range(8, 16):
        (loss, metrics), gradient = step(sharper, key)
        assert metrics["divergence"] >= 0
        assert_allclose(loss, 2 * metrics["nll"] + 5 * metrics["divergence"], rtol=1e-5)
        learnt = np.abs(gradient["layers"]["experts"]["w_down"]).sum(axis=(2, 3)) > 0
        for w in gradient["layers"]["experts"].values():
            assert_array_equal(np.abs(w).sum(axis=(2, 3)) > 0, learnt)
        assert set(learnt.sum(axis=1)) <= {1, 2}
        assert metrics["divergence"] > 1e-4 or learnt.sum() == 2
        drawn.append(learnt)
    assert any(one[0].tolist() != one[1].tolist() for one in drawn)
    assert any(one.sum() == 4 for one in drawn)


def plain_passes(hidden, table, targets, weights):
    """`(loss, nll, divergence)` by their definitions, from all logits at once."""
    p, q = (jax.nn.softmax(h.astype(jnp.float32) @ table.T) for h in hidden)
    divergence = 0.5 * ((p * jnp.log(p / q)).sum(axis=1) + (q * jnp.log(q / p)).sum(axis=1))
    divergence = (weights * divergence).sum()
    nll = sum(plain(h, table, targets, weights)[0] for h in hidden)
    return nll + 5.0 * divergence, nll, divergence


@pytest.mark.parametrize(
    ("n_tokens", "dtype"), [(64, "float32"), (61, "float32"), (64, "bfloat16")]
)
def test_the_loss_of_two_passes(monkeypatch, n_tokens, dtype):
    """Sums, and the gradient of the loss by both passes and the table."""
    hidden, *others = inputs(n_tokens, dtype)
    passes = hidden, hidden + normal(7, hidden.shape, dtype)

    def chunked(*args):
        return consistent_cross_entropy(5.0, *args)

    check_chunks(monkeypatch, chunked, plain_passes, passes, *others)
