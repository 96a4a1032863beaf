"""The parameters of models with fewer experts."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from aoe_jax.conversion import merging
from aoe_jax.conversion.merging import METHODS, pruned_params
from aoe_jax.conversion.moments import merged_scores, score_moments
from aoe_jax.model.decoder import Decoder
from tests.conversion.experts import disguised
from tests.conversion.models import batches, merged_scores_of, model_of, moments_of, seen_by

pytestmark = pytest.mark.usefixtures("ragged")
KINDS = pytest.mark.parametrize("kind", ["aoe", "router"])


def prune(kind, n_experts, method="uncurl", seed=0):
    return pruned_params(
        model_of(kind), moments_of(kind), merged_scores_of(kind), n_experts, method, seed
    )


def logits(decoder, params):
    return np.asarray(
        jax.jit(lambda p: decoder.apply({"params": p}, batches(1)[0]["inputs"])[0])(params)
    )


@pytest.mark.parametrize("method", METHODS)
@KINDS
def test_as_many_experts_as_before_are_the_same(kind, method):
    params, _ = prune(kind, 4, method)
    before, after = jax.device_get((model_of(kind).params, params))
    if kind == "router" and method != "greedy":
        old, new = (p["layers"]["experts"].pop("w_router") for p in (before, after))
        assert old.shape == new.shape and np.abs(old - new).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, before, after)


def doubled(model, order):
    """Every expert twice, the copy disguised; twice as many are chosen, so that each copy has half
    the weight.
    """
    config = model.config
    experts = dataclasses.replace(config.experts, n_experts=8, top_k=4)
    config = dataclasses.replace(config, experts=experts)
    params = jax.device_get(model.params)
    old = params["layers"]["experts"]
    new = {
        name: np.empty((2, 8, *a.shape[2:]), a.dtype)
        for name, a in old.items()
        if name != "w_router"
    }
    for layer, expert in np.ndindex(2, 4):
        weights = {name: old[name][layer, expert] for name in new}
        for place, copy in (
            (expert, weights),
            (4 + expert, disguised(weights, seed=10 * layer + expert)),
        ):
            for name in new:
                new[name][layer, order[place]] = copy[name]
    if "w_router" in old:
        new["w_router"] = np.empty((2, old["w_router"].shape[1], 8), np.float32)
        new["w_router"][:, :, order] = np.tile(old["w_router"], 2)
    params = params | {"layers": params["layers"] | {"experts": new}}
    return dataclasses.replace(
        model, config=config, decoder=Decoder.from_config(config), params=params
    )


@KINDS
def test_doubled_experts_are_found_and_restored(kind, monkeypatch):
    """The router is drawn anew, so the test gives it back the columns that it had."""
    order = np.random.default_rng(3).permutation(8)
    model = model_of(kind)
    twice = doubled(model, order)
    want = logits(model.decoder, model.params)
    np.testing.assert_allclose(logits(twice.decoder, twice.params), want, atol=1e-5)

    moments, scores = score_moments(twice, batches()), merged_scores(twice, batches())

    def restored():
        params, clusters = pruned_params(twice, moments, scores, 4, "uncurl")
        assert all(len(cluster.members) == 2 for of_layer in clusters for cluster in of_layer)
        params = jax.device_get(params)
        if kind == "router":
            columns = [[cluster.reference for cluster in of_layer] for of_layer in clusters]
            router = twice.params["layers"]["experts"]["w_router"]
            params["layers"]["experts"]["w_router"] = np.take_along_axis(
                router, np.array(columns)[:, None], axis=2
            )
        return logits(model.decoder, params)

    np.testing.assert_allclose(restored(), want, atol=2e-5)
    monkeypatch.setattr(merging, "aligned", lambda reference, expert: expert)
    assert np.abs(restored() - want).max() > 0.1  # of plain averages


def test_norms_of_merged_experts_are_those_that_members_were_chosen_by():
    params, clusters = prune("aoe", 2)
    x, chosen, scores = seen_by("aoe")
    w_gate_down = np.asarray(params["layers"]["experts"]["w_gate_down"], np.float64)
    for layer, of_layer in enumerate(clusters):
        assert any(len(cluster.members) > 1 for cluster in of_layer)
        for number, cluster in enumerate(of_layer):
            members = list(cluster.members)
            norms = np.linalg.norm(x[layer] @ w_gate_down[layer, number], axis=1)
            own = chosen[layer][:, members]
            found = np.average(norms, weights=own.sum(axis=1))
            want = [np.average(scores[layer][:, m], weights=chosen[layer][:, m]) for m in members]
            np.testing.assert_allclose(found, np.average(want, weights=own.sum(axis=0)), rtol=1e-4)
            np.testing.assert_allclose(cluster.weights, own.sum(axis=0) / own.sum(), rtol=1e-6)


def test_a_scaled_norm_leaves_the_output():
    """What w_gate_down gains, w_gate_up loses."""
    scaled, _ = prune("aoe", 2)
    unknown = mock.Mock(return_value=np.zeros((2, 2)))
    as_averaged, _ = pruned_params(model_of("aoe"), moments_of("aoe"), unknown, 2, "uncurl")
    a, b = (jax.device_get(params["layers"]["experts"]) for params in (scaled, as_averaged))
    ratio = np.linalg.norm(a["w_gate_down"], axis=(2, 3)) / np.linalg.norm(
        b["w_gate_down"], axis=(2, 3)
    )
    assert ratio.max() > 1.05
    np.testing.assert_allclose(
        a["w_gate_down"] @ a["w_gate_up"], b["w_gate_down"] @ b["w_gate_up"], atol=1e-6
    )


def test_a_router_is_drawn_by_its_seed():
    routers = [
        np.asarray(prune("router", 2, seed=s)[0]["layers"]["experts"]["w_router"])
        for s in (0, 0, 1)
    ]
    assert routers[0].shape == (2, 32, 2)
    np.testing.assert_array_equal(routers[0], routers[1])
    assert (
        np.abs(routers[0] - routers[2]).max() > 0.1
        and np.abs(routers[0][0] - routers[0][1]).max() > 0.1
    )


def test_greedy_keeps_the_columns_of_its_experts():
    params, clusters = prune("router", 2, "greedy")
    for layer, of_layer in enumerate(clusters):
        for number, cluster in enumerate(of_layer):
            old, new = (
                p["layers"]["experts"]["w_router"][layer]
                for p in (model_of("router").params, params)
            )
            np.testing.assert_array_equal(new[:, number], old[:, cluster.reference])
