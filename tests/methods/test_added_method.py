"""Methods in files of their own: in a layer, in training on a mesh, and token by token."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from aoe_jax.evaluation.generation import Generator, Sampling
from aoe_jax.methods import find_method
from aoe_jax.sharding import batch_sharding, make_mesh, put_batch
from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.step_times import random_batch
from tests.evaluation.models import by_full_passes, make_config, make_model
from tests.methods.method_layers import assert_agree, by_loops, make, scores_of

ABOVE_MEAN = "examples/add_a_method.py:AboveMean"
SCORES = "configs/compare/scores.py"


def test_in_a_layer(x64, ragged):
    layer, params, x = make("aoe", find_method(ABOVE_MEAN)())

    def formula(params, x):
        scores = scores_of(params, x)
        chosen = scores > scores.mean(axis=1, keepdims=True)
        return by_loops(params, x, jax.nn.softmax(jnp.where(chosen, scores, -jnp.inf)))

    assert_agree(layer, params, x, formula)


def losses_of_training(config, n_devices):
    mesh, losses = make_mesh(config, jax.devices()[:n_devices]), []
    with jax.set_mesh(mesh):
        state, step = jax.jit(lambda: init_state(config, 0))(), jax.jit(make_train_step(config))
        batch = put_batch(batch_sharding(mesh), random_batch(config))
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("router", f"{SCORES}:Hash"), ("aoe", f"{SCORES}:DefaultVectors")]
)
def test_in_a_model(ragged, kind, name):
    """Three steps on eight devices as on one; greedy decoding as by full passes."""
    settings = {"experts__kind": kind, "routing__name": name, "train__warmup": 0.1}
    alone = make_config(**settings, mesh__data=1)
    found = losses_of_training(make_config(**settings, mesh__data=2, mesh__expert=4), 8)
    assert_allclose(found, losses_of_training(alone, 1), rtol=2e-5)
    assert found[-1] < found[0]
    model, prompts = make_model(alone), [[5, 6, 7], [9]]
    logits = jax.jit(lambda tokens: model.decoder.apply({"params": model.params}, tokens)[0])
    found = Generator(model).generate(prompts, 6, sampling=Sampling(temperature=0.0), chunk=3)
    assert found == by_full_passes(logits, prompts, 6, length=16)
