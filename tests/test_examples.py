"""The programs of `examples/`, with fewer steps; and the benchmark on the NNX model."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.strangers_model import MODELS
from examples import add_a_method, nnx_model, train_loop, vision

pytestmark = pytest.mark.usefixtures("ragged")


def test_train_loop():
    lines = train_loop.train(steps=40)
    assert lines[-1]["nll"] < lines[0]["nll"] - 2


@pytest.mark.parametrize("name", MODELS)
def test_strangers_model(name):
    """It trains with each of the layers."""
    model = nnx_model.GPT(MODELS[name], d_model=32, n_layers=1, rngs=nnx.Rngs(0))
    text = np.frombuffer(nnx_model.TEXT.read_bytes(), np.uint8)
    losses = nnx_model.train(model, text, steps=40)
    assert losses[-1] < losses[0] - 2
    n_parameters = sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert n_parameters > 256 * 32


def test_vision():
    found = vision.compare(epochs=4, seeds=1)
    assert set(found) == {"AoE", "MoE"}
    assert all(accuracy > 0.5 for (accuracy,) in found.values())


def test_add_a_method():
    """About half of the experts are above the mean."""
    assert all(3 < found < 5 for found in add_a_method.experts_per_token().values())
