"""Moments of scores, batch by batch, are those of all scores at once."""

import dataclasses

import jax
import numpy as np
import pytest

from aoe_jax.conversion.moments import Moments, merged_scores, score_moments
from tests.conversion.models import batches, merged_scores_of, model_of, moments_of, seen_by
from tests.evaluation.models import make_config, make_model

pytestmark = pytest.mark.usefixtures("ragged")


def slow(kind):
    return pytest.param(kind, marks=pytest.mark.slow)


def test_norms_of_an_aoe():
    """Against norms of the layers' inputs by hand, and the choice by them."""
    x, chosen, scores = seen_by("aoe")
    w_gate_down = np.asarray(model_of("aoe").params["layers"]["experts"]["w_gate_down"], np.float64)
    by_hand = np.linalg.norm(np.einsum("ltd,lzdr->ltzr", x, w_gate_down), axis=-1)
    np.testing.assert_allclose(scores, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(chosen, (-by_hand).argsort(axis=-1).argsort(axis=-1) < 2)
    check(moments_of("aoe"), chosen, scores)


@pytest.mark.parametrize(
    "kind",
    ["router, top_p", *(pytest.param(k, marks=pytest.mark.slow) for k in ("router", "capacity"))],
)
def test_logits_of_a_router(kind):
    _, chosen, scores = seen_by(kind)
    assert (chosen.sum(axis=-1) == 2).all() == (kind != "router, top_p")
    check(moments_of(kind), chosen, scores)


def check(moments, chosen, scores):
    assert moments.tokens == scores.shape[1] == 3 * (8 * 32 - 12)
    np.testing.assert_allclose(moments.mean, scores.mean(axis=1), atol=1e-6)
    centred = scores - scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        moments.scatter, np.einsum("lty,ltz->lyz", centred, centred), rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(
        moments.gram, np.einsum("lty,ltz->lyz", scores, scores), rtol=1e-5, atol=1e-3
    )
    np.testing.assert_array_equal(moments.chosen, chosen.sum(axis=1))
    np.testing.assert_allclose(
        moments.chosen_score, (chosen * scores).sum(axis=1), rtol=1e-5, atol=1e-3
    )
    np.testing.assert_array_equal(moments.load, chosen.mean(axis=1))


def test_the_choice_is_the_models_with_its_selection_bias():
    bias = np.zeros((2, 4), np.float32)
    bias[:, 3] = 100
    moments = score_moments(
        dataclasses.replace(model_of("aoe"), routing_state={"selection_bias": bias}), batches()
    )
    np.testing.assert_array_equal(moments.load[:, 3], 1)
    # These are of scores without it.
    np.testing.assert_allclose(moments.mean[0], moments_of("aoe").mean[0], rtol=1e-5)


def test_nothing_is_lost_where_means_are_large():
    scores = np.random.default_rng(0).normal(1e7, 1.0, (4, 50, 3))

    def of(part):
        centred = part - part.mean(axis=0)
        zeros = np.zeros((1, 3))
        return Moments(
            float(len(part)), part.mean(axis=0)[None], (centred.T @ centred)[None], zeros, zeros
        )

    total = of(scores[0])
    for part in scores[1:]:
        total = total.plus(of(part))
    np.testing.assert_allclose(total.scatter[0] / 199, np.cov(scores.reshape(-1, 3).T), rtol=1e-6)


def test_scores_of_merged_experts():
    """Over the tokens that chose a member, twice those that chose two; over all where nobody is a
    member of anything.
    """
    x, chosen, _ = seen_by("aoe")
    w_gate_down = np.random.default_rng(1).normal(size=(2, 3, 32, 8)).astype(np.float32)
    members = np.zeros((2, 4, 3))
    members[:, [0, 2], 0] = members[:, 3, 1] = 1
    norms = np.linalg.norm(np.einsum("ltd,lkdr->ltkr", x, w_gate_down), axis=-1)
    own = chosen @ members
    want = np.stack([(own * norms)[..., :2].sum(axis=1) / own[..., :2].sum(axis=1)])[0]
    want = np.concatenate([want, norms[..., 2:].mean(axis=1)], axis=1)
    np.testing.assert_allclose(merged_scores_of("aoe")(w_gate_down, members), want, rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_gathers_the_same():
    split = make_model(make_config(mesh__data=2, mesh__fsdp=2, mesh__expert=2))
    assert split.mesh.size == 8
    alone, found = moments_of("aoe"), score_moments(split, batches())
    for name in ("mean", "scatter", "chosen", "chosen_score"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-5, atol=1e-3)
    w_gate_down, members = (
        jax.device_get(split.params["layers"]["experts"]["w_gate_down"][:, :1]),
        np.zeros((2, 4, 1)),
    )
    members[:, :2] = 1
    scores = [
        of(w_gate_down, members)
        for of in (merged_scores_of("aoe"), merged_scores(split, batches()))
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)
