"""The scores of `configs/compare/scores.py`, which are routers in a file of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import methods
from aoe_jax.methods import find_method
from aoe_jax.moe.routing import Hooks, TopK
from tests.arrays import normal
from tests.methods.method_layers import assert_agree, by_loops, make, scores_of
from tests.moe.contexts import context

pytestmark = pytest.mark.usefixtures("x64", "ragged")


def method(name, **settings):
    return find_method(f"configs/compare/scores.py:{name}")(**settings)


def test_the_file_is_found_outside_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "_OF_FILES", {})
    assert method("Centred").decay == 0.99


def top_two(scores):
    """Weights `[T, n]`, the softmax over the two highest scores."""
    highest = jax.lax.top_k(scores, 2)[0][:, -1:]
    return jax.nn.softmax(jnp.where(scores >= highest, scores, -jnp.inf))


@pytest.mark.parametrize(("kind", "experts"), [("router", {}), ("aoe", {"score_neurons": 4})])
def test_mpi_of_a_router_and_of_own_gates(kind, experts):
    layer, params, x = make(kind, method("MPI", norm=1.5), **experts)

    def formula(params, x):
        gates = params["w_gate"]
        rows = params["w_router"].T if "w_router" in params else gates[:, :, 0]
        moved = jnp.stack([row @ gate @ gate.T for row, gate in zip(rows, gates, strict=True)])
        unit = moved / jnp.linalg.norm(moved, axis=1, keepdims=True)
        return by_loops(params, x, top_two(1.5 * x @ unit.T))

    assert_agree(layer, params, x, formula)


def test_self_routing():
    layer, params, x = make("router", method("SelfRouting"))
    assert_agree(layer, params, x, lambda p, x: by_loops(p, x, top_two(x[:, :5])))


def test_centring():
    centred, scores = method("Centred", decay=0.5), normal(0, (40, 6)) + jnp.arange(6)
    mean = jnp.arange(6) * 1.0
    routing = centred(scores, {}, context(scores, training=True, state={"mean": mean}))
    expert = jax.lax.top_k(scores - mean, 2)[1]
    assert_array_equal(routing.expert.reshape(40, 2), expert)
    weight = jax.nn.softmax(jnp.take_along_axis(scores - mean, expert, 1))
    assert_allclose(routing.weight.reshape(40, 2), weight, rtol=1e-6)
    assert_allclose(routing.records["mean"], scores.mean(axis=0), rtol=1e-6)


def test_equal_tokens_have_equal_hashes_and_layers_have_different_ones():
    hashed, ids = method("Hash"), jnp.arange(400) % 200

    def experts(layer_index):
        ctx = context(jnp.zeros((400, 8)), token_ids=ids, layer_index=layer_index)
        scores = hashed.hooks.scores(hashed, ctx.x, {"w_up": np.zeros(8)}, ctx)
        routing = hashed(scores, {}, ctx)
        assert_array_equal(routing.weight, 0.5)
        return np.asarray(routing.expert.reshape(400, 2))

    first = experts(0)
    assert_array_equal(first[:200], first[200:])
    assert (first != experts(1)).any(axis=1).mean() > 0.9
    assert (first[:, 0] != first[:, 1]).all()
    assert np.bincount(first[:200].flat, minlength=8).min() > 25  # 50 on average


def test_experts_of_a_hash_are_weighted_by_their_scores():
    ctx = context(jnp.zeros((40, 8)), token_ids=jnp.arange(40), layer_index=1)
    weights, scores = {"w_up": np.zeros(8)}, normal(0, (40, 8))
    hashed = method("Hash")
    want = hashed(hashed.hooks.scores(hashed, ctx.x, weights, ctx), {}, ctx).expert.reshape(40, 2)
    routing = method("HashChoice")(scores, weights, ctx)
    assert_array_equal(routing.expert.reshape(40, 2), want)
    weight = jax.nn.softmax(jnp.take_along_axis(scores, want, 1))
    assert_allclose(routing.weight.reshape(40, 2), weight, rtol=1e-6)


def test_scores_of_a_method_have_gradients_in_aoe():
    """Weights are of the method's scores, also as the softmax over the chosen ones."""

    class Own(TopK):
        hooks = Hooks(scores=lambda method, x, weights, ctx: x[:, :5])

    layer, params, x = make("aoe", Own())
    assert_agree(layer, params, x, lambda p, x: by_loops(p, x, top_two(x[:, :5])))


def test_a_temperature_divides_the_scores_in_the_weights():
    layer, params, x = make("aoe", method("Tempered", temperature=0.5))
    assert_agree(layer, params, x, lambda p, x: by_loops(p, x, top_two(2 * scores_of(p, x))))


def test_default_vectors():
    layer, params, x = make("aoe", method("DefaultVectors"))

    def formula(params, x):
        weights = jax.nn.softmax(scores_of(params, x))
        highest = jax.lax.top_k(weights, 2)[0][:, -1:]
        chosen = weights >= highest
        others = jnp.where(chosen, 0, weights) @ params["w_default"]
        return by_loops(params, x, jnp.where(chosen, weights, 0)) + others

    assert_agree(layer, params, x, formula)
