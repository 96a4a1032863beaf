"""Scores and choices of tokens, and their moments."""

import dataclasses

import numpy as np
import pytest

from aoe_jax.conversion.observations import score_moments
from tests.conversion.models import batches, model_of, moments_of, observed
from tests.evaluation.models import make_config, make_model

pytestmark = pytest.mark.usefixtures("ragged")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("router", "capacity")]


@pytest.mark.parametrize("kind", ["aoe", "router, top_p", *SLOW])
def test_moments_are_those_of_all_scores(kind):
    scores, chosen, x = observed(model_of(kind), batches())
    if kind == "aoe":
        w = np.asarray(model_of(kind).params["layers"]["experts"]["w_gate_down"], np.float64)
        norms = np.linalg.norm(np.einsum("ltd,lzdr->ltzr", x, w), axis=-1)
        np.testing.assert_allclose(scores, norms, rtol=1e-5)
        np.testing.assert_array_equal(chosen, (-norms).argsort(axis=-1).argsort(axis=-1) < 2)
    assert (chosen.sum(axis=-1) == 2).all() == (kind != "router, top_p")
    moments, scores = moments_of(kind), scores.astype(np.float64)
    assert moments.tokens == scores.shape[1] == 3 * (8 * 32 - 12)
    if kind == "aoe":
        scores -= scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(moments.second, scores.mT @ scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(moments.load, chosen.mean(axis=1))


def test_the_choice_is_the_models_with_its_selection_bias():
    bias = np.zeros((2, 4), np.float32)
    bias[:, 3] = 100
    biased = dataclasses.replace(model_of("router"), routing_state={"selection_bias": bias})
    moments = score_moments(biased, batches())
    np.testing.assert_array_equal(moments.load[:, 3], 1)
    # The scores themselves have no bias.
    np.testing.assert_allclose(moments.second[0], moments_of("router").second[0], rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_observes_the_same():
    split = make_model(make_config(mesh__data=2, mesh__fsdp=2, mesh__expert=2))
    assert split.mesh.size == 8
    found = score_moments(split, batches())
    for name in ("second", "load"):
        alone = getattr(moments_of("aoe"), name)
        np.testing.assert_allclose(getattr(found, name), alone, rtol=1e-5, atol=1e-3)
