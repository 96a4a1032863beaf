"""Which experts are similar, how they are aligned, and the result of merging them."""

import dataclasses

import jax
import numpy as np
import pytest

from aoe_jax.conversion import merging
from aoe_jax.conversion.merging import (
    METHODS,
    Cluster,
    aligned,
    find_clusters,
    merge,
    pruned_params,
    similarity,
)
from aoe_jax.conversion.observations import score_moments
from aoe_jax.model.decoder import Decoder
from tests.conversion.models import SHAPES, batches, disguised, draw, model_of, moments_of

KINDS = pytest.mark.parametrize("kind", SHAPES)
LOAD = np.array([0.1, 0.5, 0.2, 0.4, 0.3, 0.5])
X = np.random.default_rng(9).normal(size=(30, 16))


def scores(mean=0.0):
    """`[500, 6]`; those of experts i and i + 3 are alike."""
    normal = np.random.default_rng(0).normal
    return np.tile(normal(size=(500, 3)), 2) + 0.1 * normal(size=(500, 6)) + mean


def second_moments(h):
    return (h - h.mean(axis=0)).T @ (h - h.mean(axis=0))


SIMILAR = similarity(second_moments(scores()))


def test_similarity_is_of_cosines():
    np.testing.assert_allclose(SIMILAR, (1 + np.corrcoef(scores().T)) / 2, atol=1e-12)
    np.testing.assert_array_equal(SIMILAR, SIMILAR.T)
    np.testing.assert_array_equal(np.diagonal(SIMILAR), 1)
    h = scores()
    opposite = similarity(second_moments(np.stack([h[:, 0], -h[:, 0]], axis=1)))
    np.testing.assert_allclose(opposite, np.eye(2), atol=1e-12)
    h[:, 2] = 0  # an expert without scores
    np.testing.assert_array_equal(similarity(h.T @ h)[2], [0.5, 0.5, 1, 0.5, 0.5, 0.5])


def test_norms_far_from_0_must_be_centred():
    h = scores(mean=20.0)
    raw, centred = similarity(h.T @ h), similarity(second_moments(h))
    apart = ~np.tile(np.eye(3, dtype=bool), (2, 2))
    assert raw.min() > 0.99 and centred[apart].max() < 0.6 < 0.9 < centred[~apart].min()
    found = find_clusters("uncurl", centred, LOAD, 3)
    assert {cluster.members for cluster in found} == {(0, 3), (1, 4), (2, 5)}


@pytest.mark.parametrize("n_clusters", range(1, 7))
@pytest.mark.parametrize("method", [*METHODS, "equal"])
def test_as_many_clusters_as_are_asked_for(method, n_clusters):
    similar, method = (np.ones((6, 6)), "uncurl") if method == "equal" else (SIMILAR, method)
    found = find_clusters(method, similar, LOAD, n_clusters)
    assert found == find_clusters(method, similar, LOAD, n_clusters)
    assert len(found) == n_clusters == len({cluster.reference for cluster in found})
    members = sorted(member for cluster in found for member in cluster.members)
    assert len(set(members)) == len(members)
    assert members == list(range(6)) if method != "greedy" else len(members) == n_clusters
    assert [c.reference for c in found] == sorted(c.reference for c in found)
    for cluster in found:
        share = LOAD[list(cluster.members)]
        np.testing.assert_allclose(cluster.weights, share / share.sum())
        assert LOAD[cluster.reference] == share.max() and cluster.reference in cluster.members


def test_baselines_keep_the_experts_of_largest_load():
    kept = find_clusters("greedy", SIMILAR, LOAD, 3)
    assert kept == [Cluster(number, (number,), (1.0,)) for number in (1, 3, 5)]
    merged = find_clusters("frequency_merge", SIMILAR, LOAD, 3)
    assert [c.members for c in merged] == [(1, 4), (0, 3), (2, 5)]
    np.testing.assert_allclose(merged[0].weights, [0.5 / 0.8, 0.3 / 0.8])
    assert Cluster.of([2, 0], np.zeros(3)) == Cluster(0, (0, 2), (0.5, 0.5))  # never chosen


def same_function(a, b):
    for one, other in zip(output(a), output(b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def output(expert):
    """`(E(X), |X w_gate_down|)`; 0 for the norm of whole gates."""
    code = X @ expert["w_gate_down"] if "w_gate_down" in expert else np.zeros((30, 1))
    gate = X @ expert["w_gate"] if "w_gate" in expert else code @ expert["w_gate_up"]
    hidden = gate / (1 + np.exp(-gate)) * (X @ expert["w_up"])
    return hidden @ expert["w_down"], np.linalg.norm(code, axis=1)


@KINDS
def test_alignment_undoes_a_disguise(kind):
    expert = draw(kind)
    hidden = disguised(expert, seed=5)
    same_function(expert, hidden)
    assert max(np.abs(hidden[name] - expert[name]).max() for name in expert) > 0.5
    found = aligned(expert, hidden)
    for name in expert:
        np.testing.assert_allclose(found[name], expert[name], atol=1e-10)


@KINDS
def test_alignment_keeps_the_function_of_an_expert(kind):
    """The expert comes nearer even to one that has nothing in common with it."""
    reference, expert = draw(kind), draw(kind, seed=1)
    found = aligned(reference, expert)
    same_function(found, expert)

    def likeness(other):
        return sum(np.vdot(reference[name], other[name]) for name in reference)

    assert likeness(found) > likeness(expert) + 5


CLUSTERS = [Cluster(1, (0, 1, 3), (0.2, 0.5, 0.3)), Cluster(2, (2,), (1.0,))]


def layer(experts, dtype="float32"):
    return {n: np.stack([expert[n] for expert in experts]).astype(dtype) for n in experts[0]}


def test_members_are_weighted():
    expert = draw("router")  # alignment does not depend on its scale
    scaled = [{name: factor * a for name, a in expert.items()} for factor in (3.0, 1.0, 9.0, 2.0)]
    for name, a in merge(layer(scaled), CLUSTERS).items():
        np.testing.assert_allclose(a[0], (0.2 * 3 + 0.5 * 1 + 0.3 * 2) * expert[name], rtol=1e-5)
        np.testing.assert_allclose(a[1], 9 * expert[name], rtol=1e-5)


def test_a_merged_norm_is_the_mean_of_its_members():
    """The product of the factors is still that of averages; dtypes stay."""
    experts = [draw("aoe", seed) for seed in range(4)]
    norms = [np.linalg.norm(expert["w_gate_down"]) for expert in experts]
    merged = merge(layer(experts), CLUSTERS)
    mean = 0.2 * norms[0] + 0.5 * norms[1] + 0.3 * norms[3]
    np.testing.assert_allclose(np.linalg.norm(merged["w_gate_down"][0]), mean, rtol=1e-5)
    members = [aligned(experts[1], experts[i]) for i in (0, 1, 3)]
    down, up = (
        sum(w * e[name] for w, e in zip(CLUSTERS[0].weights, members, strict=True))
        for name in ("w_gate_down", "w_gate_up")
    )
    assert np.linalg.norm(down) < 0.8 * mean
    product = merged["w_gate_down"][0] @ merged["w_gate_up"][0]
    np.testing.assert_allclose(product, down @ up, atol=1e-5)
    merged = merge(layer(experts, "float16"), CLUSTERS)
    assert {a.dtype.name for a in merged.values()} == {"float16"}


def pruned(kind, n_experts, method="uncurl", seed=0):
    return pruned_params(model_of(kind), moments_of(kind), n_experts, method, seed)


def logits(decoder, params):
    apply = jax.jit(lambda p: decoder.apply({"params": p}, batches(1)[0]["inputs"])[0])
    return np.asarray(apply(params))


def doubled(model):
    """Every expert twice, the copy disguised; twice as many are chosen, so that each copy has half
    the weight.
    """
    order = np.random.default_rng(3).permutation(8)
    experts = dataclasses.replace(model.config.experts, n_experts=8, top_k=4)
    config = dataclasses.replace(model.config, experts=experts)
    params = jax.device_get(model.params)
    old = dict(params["layers"]["experts"])
    router = old.pop("w_router", None)
    new = {name: np.empty((2, 8, *a.shape[2:]), a.dtype) for name, a in old.items()}
    for layer, expert in np.ndindex(2, 4):
        weights = {name: a[layer, expert] for name, a in old.items()}
        for name, copy in disguised(weights, seed=10 * layer + expert).items():
            new[name][layer, order[expert]] = weights[name]
            new[name][layer, order[4 + expert]] = copy
    if router is not None:
        new["w_router"] = np.empty((2, router.shape[1], 8), np.float32)
        new["w_router"][:, :, order] = np.tile(router, 2)
    params = params | {"layers": params["layers"] | {"experts": new}}
    decoder = Decoder.from_config(config)
    return dataclasses.replace(model, config=config, decoder=decoder, params=params)


@pytest.mark.usefixtures("ragged")
@KINDS
def test_doubled_experts_are_found_and_restored(kind, monkeypatch):
    """The router is drawn anew, so the test gives it back the columns that it had."""
    model = model_of(kind)
    twice = doubled(model)
    want = logits(model.decoder, model.params)
    np.testing.assert_allclose(logits(twice.decoder, twice.params), want, atol=1e-5)
    moments = score_moments(twice, batches())

    def restored():
        params, clusters = pruned_params(twice, moments, 4, "uncurl")
        assert all(len(cluster.members) == 2 for of_layer in clusters for cluster in of_layer)
        params = jax.device_get(params)
        if kind == "router":
            columns = np.array([[cluster.reference for cluster in layer] for layer in clusters])
            router = twice.params["layers"]["experts"]["w_router"]
            router = np.take_along_axis(router, columns[:, None], axis=2)
            params["layers"]["experts"]["w_router"] = router
        return logits(model.decoder, params)

    np.testing.assert_allclose(restored(), want, atol=2e-5)
    monkeypatch.setattr(merging, "aligned", lambda reference, expert: expert)
    assert np.abs(restored() - want).max() > 0.1  # plain averages


@pytest.mark.usefixtures("ragged")
def test_routers():
    """A new one depends on the seed and the layer; greedy keeps the columns of its experts."""
    first, again, other = (
        np.asarray(pruned("router", 2, seed=s)[0]["layers"]["experts"]["w_router"])
        for s in (0, 0, 1)
    )
    assert first.shape == (2, 32, 2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 < np.abs(first[0] - first[1]).max()
    params, clusters = pruned("router", 2, "greedy")
    old, new = (p["layers"]["experts"]["w_router"] for p in (model_of("router").params, params))
    for layer, of_layer in enumerate(clusters):
        kept = [cluster.reference for cluster in of_layer]
        np.testing.assert_array_equal(new[layer], np.asarray(old[layer])[:, kept])
