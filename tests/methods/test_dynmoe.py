"""DynMoE: gates and losses by plain loops, and experts that are added and removed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.methods.dynmoe import DynMoE, diversity, relative_scores, simplicity, updated_pool
from aoe_jax.model.decoder import initial_routing_state
from aoe_jax.moe import scoring
from aoe_jax.moe.reference import l2_norm
from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.step_times import random_batch
from tests.arrays import assert_finite, normal
from tests.methods.method_layers import (
    EXPERTS,
    TOKENS,
    D,
    assert_agree,
    by_loops,
    make,
    scores_of,
    small_config,
)
from tests.moe.contexts import context

pytestmark = pytest.mark.smoke


def scores_of_formula(params, x):
    """Cosines, or relative norms, by their formulas."""
    if "w_router" in params:
        return x @ params["w_router"] / l2_norm(x)[:, None] / l2_norm(params["w_router"].T)
    lengths = l2_norm(params["w_gate_down"].reshape(EXPERTS, -1))
    return scores_of(params, x) * D**0.5 / l2_norm(x)[:, None] / lengths - 1


def relative_norms(x, w_score):
    """`relative_scores` of AoE."""
    norms = scoring.scores_of_all(x, w_score)
    return relative_scores(norms, {"w_score": w_score}, context(norms, x=x))


def cosines(x, w_router):
    """`relative_scores` of a router."""
    logits = scoring.router_logits(x, w_router)
    return relative_scores(logits, {"w_router": w_router}, context(logits, x=x))


def weights_of(params, x, training, live):
    """Equal weights of the experts whose gap is positive."""
    scores, thresholds = scores_of_formula(params, x), params["firing_threshold"]
    gap = jax.nn.sigmoid(3.0 * scores) - jax.nn.sigmoid(3.0 * thresholds)
    fires = (gap > 0) & live
    straight_through = gap - jax.lax.stop_gradient(gap) + 1
    gate = jnp.where(fires, straight_through, 0)
    if not training:
        best = jnp.argmax(jnp.where(live, scores, -9), axis=1, keepdims=True)
        gate += ~fires.any(axis=1, keepdims=True) & (best == jnp.arange(EXPERTS))
    return gate / jnp.maximum(jax.lax.stop_gradient(gate).sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize("kind", ["aoe", "router"])
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_plain_loops(x64, ragged, kind, training):
    """Two of five places hold an expert, so many tokens have none. In training the layer adds
    nothing to these; otherwise they go to the best expert. Padding counts nowhere.
    """
    routing = DynMoE(initial_experts=2, temperature=3.0)
    layer, params, x = make(kind, routing, recompute=kind == "router", training=training)
    live, real = jnp.arange(EXPERTS) < 2, jnp.arange(TOKENS) % 3 > 0

    def formula(params, x):
        weights = weights_of(params, x, training, live)
        return by_loops(params, x, weights * real[:, None])

    stats = assert_agree(layer, params, x, formula, token_weights=real.astype(float))
    fires = ((scores_of_formula(params, x) > params["firing_threshold"]) & live)[real]
    without = ~fires.any(axis=1)
    assert 0 < without.sum() < real.sum()
    assert_array_equal(stats.live, live)
    # Statistics are of norms or logits, not of relative scores.
    assert_allclose(stats.mean_score, scores_of(params, x[real]).mean(axis=0))
    if training:
        assert_allclose(stats.load, fires.mean(axis=0))
        assert_allclose(stats.records["unclaimed"], x[real][without].sum(axis=0))
    else:
        assert_allclose(stats.load.sum() * real.sum(), fires.sum() + without.sum())
        assert stats.records is None


@pytest.mark.slow
def test_relative_norms_have_no_scale(x64):
    """Their mean is 0 and their standard deviation 1 / sqrt(2 r) for all lengths of tokens and
    weights. At zero their gradients and those of cosines are finite.
    """
    n, d, r = 8, 256, 32
    w_gate_down, x = normal(0, (n, d, r)), normal(1, (500, d))
    found = relative_norms(x, w_gate_down)
    assert abs(found.mean()) < 0.01 and abs(found.std() * (2 * r) ** 0.5 - 1) < 0.05
    scale = jnp.arange(1.0, n + 1)
    scaled = relative_norms(7 * x, scale[:, None, None] * w_gate_down)
    assert_allclose(scaled, found, atol=1e-12)
    for function, weights in ((relative_norms, w_gate_down), (cosines, w_gate_down[0])):
        gradient = jax.grad(lambda x, w: function(x, w).sum(), (0, 1))
        assert_finite(gradient(x.at[0].set(0), weights.at[0].set(0)))


def test_the_loss_of_orthonormal_columns():
    columns = jnp.linalg.qr(normal(0, (D, EXPERTS)))[0]
    live = jnp.ones(EXPERTS, bool)
    assert diversity(columns, live) < 1e-6 and abs(simplicity(columns) - 1) < 1e-6
    twice = columns.at[:, 1].set(3 * columns[:, 0])
    # Two entries are 1 for columns of any length.
    assert_allclose(diversity(twice, live), 2**0.5, rtol=1e-6)
    assert_allclose(simplicity(twice), (EXPERTS + 2) / EXPERTS, rtol=1e-6)
    assert diversity(twice, live.at[1].set(False)) < 1e-6
    gradient = jax.grad(lambda w: diversity(w, live) + simplicity(w))
    assert_finite([gradient(columns.at[:, 2].set(0)), gradient(jnp.eye(D)[:, :EXPERTS])])


def test_the_pool_after_an_update():
    """Six layers: all experts took tokens; one did not; one did not, and tokens are left; no place
    is free; no expert took any; nothing was recorded.
    """
    live = jnp.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 0, 1]]) > 0
    fired = jnp.array([[1, 2, 0], [0, 3, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0.0]])
    unclaimed = jnp.array([[0, 0], [0, 0], [1, 0], [1, 0], [0, -1], [0, 0.0]])
    found, added = updated_pool(live, fired, unclaimed)
    assert_array_equal(found, [[1, 1, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0], [1, 0, 1]])
    assert_array_equal(added, [[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])


def config_of(kind, **settings):
    return small_config(
        experts={"kind": "aoe", "score_neurons": 4} if kind == "whole" else {"kind": kind},
        routing={"name": "dynmoe"} | settings,
        balance={"aux_weight": 0.0},
        data={"seq_len": 16},
        train={"batch_size": 4, "steps": 9},
    )


def training_of(config):
    """The first state, the step and a batch."""
    state = jax.jit(lambda: init_state(config, 0))()
    return state, jax.jit(make_train_step(config)), random_batch(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "whole", "router"])
def test_an_expert_for_the_tokens_that_are_left(kind):
    """The first free place gets an expert that is aligned with them; its threshold is 0, and it
    takes them. Neurons that compute no score stay as they are.
    """
    config = config_of(kind, period_steps=1, idle_steps=0, record_steps=1, initial_experts=2)
    weights = jax.jit(lambda: init_state(config, 0))().params["layers"]["experts"]
    weights["firing_threshold"] += 0.5
    # No token is left in the second layer.
    left = normal(1, (2, 16)) * jnp.array([[1.0], [0.0]])
    n, state = 4, initial_routing_state(config)
    stats = SimpleNamespace(load=state["live"], records={"unclaimed": left})
    after, changed = config.routing.update(config, state, stats, weights)
    assert_array_equal(after["live"], [[1, 1, 1, 0], [1, 1, 0, 0]])
    assert not after["fired"].any() and not after["unclaimed"].any()
    assert (after["updates"] == 1).all()
    added = np.zeros((2, n), bool)
    added[0, 2] = True
    assert_array_equal(changed["firing_threshold"], np.where(added, 0, 0.5))
    if kind == "router":
        before, w = (np.moveaxis(p["w_router"], 2, 1) for p in (weights, changed))
        scores = cosines(left[:1], changed["w_router"][0])
        assert_allclose(scores[0, 2], 1, rtol=1e-5)
        assert_allclose(np.linalg.norm(w[0, 2]), 1, rtol=1e-5)
    else:
        name = "w_gate" if kind == "whole" else "w_gate_down"
        before, w = weights[name], changed[name]
        assert_array_equal(w[..., 4:], before[..., 4:])
        w = w[..., :4]
        lengths = np.linalg.norm(w.reshape(2, n, -1), axis=-1)
        assert_allclose(lengths[0, 2], np.median(lengths[0, :2]), rtol=1e-5)
        scores, before = relative_norms(left[:1], w[0]), before[..., :4]
        assert scores[0, 2] > 0.9 * 16**0.5 - 1 and scores[0, 2] > 2 * np.delete(scores[0], 2).max()
    name = "w_router" if kind == "router" else name
    assert changed.keys() == {"firing_threshold", name}
    assert_array_equal(w[~added], before[~added])


@pytest.mark.slow
def test_the_schedule(ragged):
    """Two steps pass, two are recorded, then the pool is updated; the next period does the same."""
    config = config_of("router", period_steps=5, idle_steps=2, record_steps=2, initial_experts=1)
    state, step, batch = training_of(config)
    live, recorded, found = [], [], []
    for _ in range(9):
        state, metrics = step(state, batch)
        live.append(state.routing_state["live"].sum(axis=1).tolist())
        recorded.append(bool(state.routing_state["unclaimed"].any()))
        found.append(float(metrics["diversity"]))
        assert metrics["finite"] and metrics["load"].max() <= 1
    assert [step for step, some in enumerate(recorded, 1) if some] == [3, 8]
    assert live == [[1, 1]] * 3 + [[2, 2]] * 5 + [[3, 3]]
    assert found[0] < 1e-6  # of one column


@pytest.mark.slow
def test_an_expert_without_tokens_is_removed(ragged):
    """A training step removes it, and no token goes there afterwards. Where no expert takes a
    token, one is added at the first free place.
    """

    def with_thresholds(state, places, value):
        layers = state.params["layers"]
        thresholds = layers["experts"]["firing_threshold"].at[:, places].set(value)
        layers = layers | {"experts": layers["experts"] | {"firing_threshold": thresholds}}
        return state.replace(params=state.params | {"layers": layers})

    config = config_of("aoe", period_steps=2, idle_steps=1, record_steps=1, initial_experts=3)
    state, step, batch = training_of(config)
    # No token goes to the second expert, and every token goes to the others.
    state = with_thresholds(with_thresholds(state, (1,), 99.0), (0, 2), -99.0)
    live, load = [], []
    for number in range(6):
        if number == 3:  # no expert takes a token any more, so one is added
            state = with_thresholds(state, (0, 2), 99.0)
        state, metrics = step(state, batch)
        live.append(state.routing_state["live"].tolist())
        load.append(metrics["load"])
    assert live[0] == [[1, 1, 1, 0]] * 2 and live[1] == live[2] == [[1, 0, 1, 0]] * 2
    assert live[3] == [[1, 0, 0, 0]] * 2  # none took a token: one is added, at the first free place
    assert_array_equal(jnp.stack(load[:3])[:, :, 1], 0)
    assert_array_equal(jnp.stack(load[:3])[:, :, (0, 2)], 1)
    assert (load[4][:, 0] > 0).all()
