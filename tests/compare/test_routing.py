"""Observations of the layers' choices, and files of them; test_runs.py tests those of real runs."""

import itertools

import jax
import numpy as np
import pytest

from aoe_jax.compare import routing
from aoe_jax.compare.figures import coactivation
from aoe_jax.compare.routing import observing, oracle_figures, overlap, read_routing
from aoe_jax.errors import UserError
from aoe_jax.model.decoder import Decoder, initial_routing_state
from aoe_jax.storage.files import write_json
from aoe_jax.training.load_statistics import layer_statistics
from aoe_jax.training.step import init_state, sequence_nll
from aoe_jax.training.step_times import random_batch
from tests.runs import tiny_config


def test_choices_are_those_before_anything_is_dropped():
    config = tiny_config(experts__kind="capacity", routing__capacity_factor=0.5)
    decoder, batch = Decoder.from_config(config), random_batch(config)
    params = jax.jit(lambda: init_state(config, 0).params)()

    def nll_of(decoder):
        return jax.jit(lambda params, batch: sequence_nll(decoder, params, None, batch, False))(
            params, batch
        )

    nll, stats = nll_of(decoder)
    seen_nll, seen_stats = nll_of(observing(decoder))
    seen = seen_stats.records["observed"]
    np.testing.assert_allclose(seen_nll, nll, rtol=1e-6)
    np.testing.assert_array_equal(seen.chosen.sum(axis=2), config.experts.top_k)
    np.testing.assert_allclose(seen.chosen.mean(axis=1), stats.load, rtol=1e-5)
    assert stats.dropped_share.min() > 0
    oracle = np.asarray(seen.oracle)
    assert (oracle[..., 2] <= oracle[..., 1] + 1e-6).all()  # the oracle comes nearest


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_oracle_has_the_weights_of_the_layer(norm_topk_prob, monkeypatch):
    """Up to a factor of each token, which relative distances do not see."""
    config = tiny_config(
        experts__kind="router",
        routing__name="sigmoid_top_k",
        routing__norm_topk_prob=norm_topk_prob,
        routing__scale=2.5,
    )
    decoder, batch = Decoder.from_config(config), random_batch(config)
    params = jax.jit(lambda: init_state(config, 0).params)()
    state = initial_routing_state(config)

    def weights_of_chosen(outputs, scores, chosen, k, is_normalised):
        assert is_normalised == norm_topk_prob
        return jax.nn.softmax(scores, where=chosen)

    def weights_of_layer(scores, slots, weights, ctx):
        found = jax.numpy.zeros(scores.shape).at[slots.token, slots.expert].set(slots.weight)
        return found[: routing.ORACLE_TOKENS]

    def observed(decoder):
        def records(params, batch):
            return sequence_nll(decoder, params, state, batch, False)[1].records["observed"]

        return jax.jit(records)(params, batch)

    monkeypatch.setattr(routing, "oracle_figures", weights_of_chosen)
    of_layer = observed(decoder.clone(observe=weights_of_layer))
    of_layer /= of_layer.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(observed(observing(decoder)).oracle, of_layer, atol=1e-5)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_the_oracle_by_trying_all_sets(is_normalised):
    rng = np.random.default_rng(0)
    outputs, scores = (
        rng.normal(size=(6, 4, 3)).astype(np.float32),
        rng.normal(size=(6, 4)).astype(np.float32),
    )
    chosen = scores > np.sort(scores, axis=1)[:, [1]]  # the best two, and of some tokens others
    chosen[3:] = np.roll(chosen[3:], 1, axis=1)
    found = np.asarray(oracle_figures(outputs, scores, chosen, 2, is_normalised))
    for token in range(6):
        share = np.exp(scores[token]) / np.exp(scores[token]).sum()
        target = share @ outputs[token]

        def distance(members, token=token, share=share, target=target):
            weights = np.where(np.isin(range(4), members), share, 0)
            weights = weights / weights.sum() if is_normalised else weights
            return np.linalg.norm(weights @ outputs[token] - target) / np.linalg.norm(target)

        of_sets = {members: distance(members) for members in itertools.combinations(range(4), 2)}
        best, own = min(of_sets, key=of_sets.get), tuple(np.flatnonzero(chosen[token]))
        want = [
            len({*best} & {*own}) / 2,
            of_sets[own],
            of_sets[best],
            np.mean(list(of_sets.values())),
        ]
        np.testing.assert_allclose(found[token], want, rtol=1e-4)
    assert len(set(found[:, 0])) > 1


def test_a_layer_that_takes_no_token_violates_no_balance():
    load = np.array([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(layer_statistics(load)["load_max_over_mean"], [2, 0])


def test_overlap_is_over_tokens_that_have_experts():
    final = np.array([[[1, 1, 0], [0, 0, 1], [0, 0, 0]], [[0, 0, 0]] * 3], bool)
    np.testing.assert_array_equal(overlap(final, final), [1, 1])
    other = np.array([[[1, 0, 1], [0, 1, 0], [1, 1, 1]]] * 2, bool)
    np.testing.assert_array_equal(overlap(other, final), [0.25, 1])


def test_coactivation_of_selections_without_a_fixed_number_of_experts():
    """The first panel too, and with other numbers of experts beside it; chance is that of
    independent choices.
    """
    load = np.array([0.5, 0.25, 0.5])
    by_chance = np.outer(load, load) * (1 - np.eye(3)) + np.diag(load)
    # Chosen evenly: a pair has 1 / 6 of the tokens.
    two_of_four = np.full((4, 4), 1 / 6) + np.eye(4) / 3
    entries = [
        ("top-p", {"coactivation": [by_chance], "experts_per_token": None}),
        ("top-k", {"coactivation": [two_of_four], "experts_per_token": 2}),
    ]
    figure = coactivation(entries)
    for axes, n in zip(figure.axes, (3, 4), strict=False):
        ratio = axes.images[0].get_array().filled(np.nan)
        np.testing.assert_allclose(ratio[~np.eye(n, dtype=bool)], 1)


LAYER_OF = ("load_entropy", "confidence_entropy", "max_violation", "dead_experts")
CHECKPOINT = {name: [0.5, None] for name in (*LAYER_OF, "overlap_with_final")}
CHECKPOINT |= {"step": 6, "load": [[1, 1], [2, 0]], "mean_score": [[0.1, None], [1, 2]]}
DISTANCES = ("distance_chosen", "distance_oracle", "distance_any")
ORACLE = {name: [0.5, 0.5] for name in ("agreement", *DISTANCES)}
ROUTING = {
    "tokens": 8,
    "kind": "aoe",
    "checkpoints": [CHECKPOINT],
    "coactivation": [[[1, 0], [0, 1]]] * 2,
    "oracle": ORACLE,
    "experts_per_token": 1,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"oracle": None}, None),
        ({"checkpoints": []}, r"the steps of its checkpoints, \[\], do not rise"),
        ({"checkpoints": [CHECKPOINT] * 2}, r"its checkpoints, \[6, 6\], do not rise"),
        ({"checkpoints": None}, "checkpoints is None, not a list"),
        ({"checkpoints": [CHECKPOINT | {"load": [[1, 1], [2]]}]}, r"checkpoints\[0\].load is "),
        ({"checkpoints": [CHECKPOINT | {"load": [["1"]]}]}, r"not numbers of shape \[2, 2\]"),
        ({"checkpoints": [CHECKPOINT | {"load": [[1, 1]]}]}, r"not numbers of shape \[2, 2\]"),
        ({"checkpoints": [CHECKPOINT | {"load_entropy": [1]}]}, r"not numbers of shape \[2\]"),
        ({"checkpoints": [{"step": 6}]}, r"checkpoints\[0\].load is None, not numbers"),
        ({"coactivation": [[[1]]]}, r"coactivation is .* not numbers of shape \[2, 2, 2\]"),
        ({"oracle": {"agreement": "x"}}, "oracle is .* not agreement, distance_chosen, "),
        ({"oracle": ORACLE | {"distance_any": [1]}}, "with a number for each of 2 layers, or null"),
        ({"tokens": True}, "tokens is True, not a whole number"),
        ({"kind": "router"}, r"kind is 'router', not one of \['aoe'\]"),
        ({"experts_per_token": None}, r"experts_per_token is None, not one of \[1\]"),
    ],
)
def test_routing_of_another_run(tmp_path, change, words):
    file = tmp_path / "routing.json"
    config = tiny_config(experts__n_experts=2, experts__top_k=1)
    write_json(file, ROUTING | change)
    if words is None:
        (last,) = read_routing(file, config)["checkpoints"]
        np.testing.assert_array_equal(last["mean_score"], [[0.1, np.nan], [1, 2]])
        return
    with pytest.raises(UserError, match=f"routing.json cannot be read: .*{words}.*; remove it, "):
        read_routing(file, config)
