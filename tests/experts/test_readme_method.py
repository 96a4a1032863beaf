"""The selection method that the README adds is what it says, in a layer and in a model."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax import AoELayer
from aoe_jax.config import ExpertsConfig
from aoe_jax.config import experts as experts_config
from aoe_jax.experts import reference
from aoe_jax.experts.selection import SELECTIONS

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def added(monkeypatch):
    """The example's names, with its method registered as the README says."""
    code = re.search(r"### Add a method.*?```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert code.count("\n") <= 30
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    monkeypatch.setitem(SELECTIONS, "above_mean", names["AboveMean"]())
    monkeypatch.setattr(experts_config, "SELECTION_NAMES", (*experts_config.SELECTION_NAMES, "above_mean"))
    return names


def test_by_hand(added):
    scores = jnp.array([[1.0, 2.0, 6.0, 4.0], [5.0, 1.0, 1.0, 1.0]])
    assignment = added["above_mean"](scores)
    np.testing.assert_array_equal(assignment.expert.reshape(2, 4), [[4, 4, 2, 3], [0, 4, 4, 4]])
    weight = np.exp([6.0, 4.0]) / np.exp([6.0, 4.0]).sum()
    np.testing.assert_allclose(assignment.weight.reshape(2, 4), [[0, 0, *weight], [1, 0, 0, 0]], rtol=1e-6)


def test_in_a_layer(added, ragged):
    """Against a plain loop, values and gradients."""
    layer = AoELayer(ExpertsConfig(n_experts=4, d_ffn=24, d_low=4, selection="above_mean"))
    x = jax.random.normal(jax.random.key(0), (12, 16))
    params = layer.init(jax.random.key(1), x)["params"]

    def by_loop(params):
        scores = reference.aoe_scores(x, params["w_down"])
        chosen = scores > scores.mean(axis=1, keepdims=True)
        weights = jax.nn.softmax(scores, where=chosen, axis=1)
        weights = jnp.where(chosen, weights, 0)
        return reference.aoe_experts(x, weights, *(params[name] for name in ("w_down", "w_up", "w_p", "w_o")))

    def by_layer(params):
        return layer.apply({"params": params}, x)[0]

    for function in (lambda f: f(params), lambda f: jax.grad(lambda p: (f(p) ** 2).sum())(params)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *map(function, (by_layer, by_loop))
        )
