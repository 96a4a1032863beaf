"""GShard's two experts: what is drawn, what they weigh, and its loss on known loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.config import Config
from aoe_jax.errors import UserError
from aoe_jax.experts.balance import layer_stats
from aoe_jax.experts.parallel import Devices
from aoe_jax.experts.selection.base import Given
from aoe_jax.experts.selection.gshard import GShard, top_two
from aoe_jax.experts.selection.top_k import top_k

CONFIG = Config.from_config_dict(
    {
        "experts": {"kind": "router", "selection": "gshard", "n_experts": 4},
        "balance": {"aux_weight": 0.0},
    }
)


def chosen(scores, key=None, weights=None):
    weights = jnp.ones(scores.shape[0]) if weights is None else weights
    given = Given(Devices(), weights, CONFIG.gshard, {}, {}, None, key, training=key is not None)
    return GShard().choose(CONFIG.experts, scores, given)


@jax.jit
def loss_of(scores, weights=None):
    """The loss of one layer, as training has it."""
    weights = jnp.ones(scores.shape[0]) if weights is None else weights
    choice = chosen(scores, jax.random.key(0), weights)
    stats = layer_stats(scores, scores, choice.assignment, weights)._replace(records=choice.records)
    stats = jax.tree.map(lambda a: a[None], stats)
    weight, value = GShard().losses(CONFIG, stats, None, {}, weights, {})["first_choice_loss"]
    assert weight == CONFIG.gshard.aux_weight
    return value


def test_evaluation_takes_both_as_top_2_does():
    scores = jax.random.normal(jax.random.key(0), (50, 6))
    for a, b in zip(top_two(scores), top_k(scores, 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_is_drawn_with_twice_its_weight():
    """The first always; no weight depends on the draw."""
    row = jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.3 / 0.7 * 0.1], [0.4, 0.1, 0.4, 0.1]]))
    n = 20_000
    found = chosen(jnp.repeat(row, n, axis=0), jax.random.key(3)).assignment
    expert, weight = found.expert.reshape(2, n, 2), found.weight.reshape(2, n, 2)
    np.testing.assert_array_equal(expert[..., 0], np.repeat([[1], [0]], n, axis=1))
    w2 = np.array([0.1 / 0.6, 0.5])
    is_drawn = expert[..., 1] < 4
    for share, w, draws, weights in zip(
        np.mean(is_drawn, axis=1), w2, is_drawn, weight, strict=True
    ):
        assert abs(share - min(1, 2 * w)) <= 3 * np.sqrt(2 * w * (1 - min(1, 2 * w)) / n) + 1e-9
        np.testing.assert_allclose(weights[:, 0], 1 - w, rtol=1e-5)
        np.testing.assert_allclose(weights[:, 1], np.where(draws, w, 0), rtol=1e-5)
    assert is_drawn[1].all() and 0 < is_drawn[0].sum() < n


@pytest.mark.parametrize("which", [0, 1])
def test_weights_have_gradients(which):
    """Those of the second where it is drawn."""
    scores, uniform = (
        jax.random.normal(jax.random.key(0), (20, 5)),
        jax.random.uniform(jax.random.key(1), (20,)),
    )
    is_drawn = uniform < 2 * jax.nn.softmax(jax.lax.top_k(scores, 2)[0])[:, 1]
    assert 0 < is_drawn.sum() < 20
    counts = is_drawn if which else jnp.ones(20)
    got = jax.grad(lambda s: top_two(s, uniform).weight[which::2].sum())(scores)
    want = jax.grad(lambda s: (counts * jax.nn.softmax(jax.lax.top_k(s, 2)[0])[:, which]).sum())(
        scores
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_loss_on_known_loads():
    """One in perfect balance, n in collapse: the scale of Switch; the paper's is 1 / n^2 of it."""
    np.testing.assert_allclose(loss_of(100 * jnp.eye(4)), 1, rtol=1e-5)
    np.testing.assert_allclose(loss_of(jnp.zeros((8, 4)).at[:, 2].set(100)), 4, rtol=1e-5)
    scores = jax.random.normal(jax.random.key(0), (30, 4))
    gate = np.asarray(jax.nn.softmax(scores))
    papers = np.mean(np.bincount(gate.argmax(axis=1), minlength=4) / 30 * gate.mean(axis=0))
    np.testing.assert_allclose(loss_of(scores), 4**2 * papers, rtol=1e-5)


def test_loss_is_of_gates_and_of_tokens_that_count():
    scores = jax.random.normal(jax.random.key(0), (30, 4))
    weights = jnp.ones(30).at[20:].set(0)
    np.testing.assert_allclose(loss_of(scores, weights), loss_of(scores[:20]), rtol=1e-5)
    load = jnp.bincount(scores.argmax(axis=1), length=4) / 30
    want = jax.grad(lambda s: 4 * (load * jax.nn.softmax(s).mean(axis=0)).sum())(scores)
    np.testing.assert_allclose(jax.grad(loss_of)(scores), want, atol=1e-7)


def test_it_is_for_two():
    with pytest.raises(
        UserError, match=r"config\.experts\.top_k=3: selection gshard is for two experts"
    ):
        Config.from_config_dict({"experts": {"selection": "gshard", "top_k": 3}})


def test_it_has_its_own_loss():
    with pytest.raises(
        UserError, match=r"config\.balance\.aux_weight=0\.01: counts both choices; .*set it to 0"
    ):
        Config.from_config_dict(
            {"experts": {"selection": "gshard"}, "balance": {"aux_weight": 0.01}}
        )
