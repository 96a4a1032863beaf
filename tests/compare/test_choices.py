"""Choices of layers, and files of them; `test_whole_suite.py` tests those of real runs."""

import jax
import numpy as np
import pytest

from aoe_jax.compare.choices import LAYER_COLUMNS, observing, overlap, read_choices
from aoe_jax.errors import UserError
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.load_balance import layer_statistics
from aoe_jax.storage.files import write_json
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
    np.testing.assert_array_equal(seen.sum(axis=2), config.experts.top_k)
    np.testing.assert_allclose(seen.mean(axis=1), stats.load, rtol=1e-5)
    assert stats.dropped_share.min() > 0


def test_a_layer_without_tokens_violates_no_balance():
    load = np.array([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(layer_statistics(load)["load_max_over_mean"], [2, 0])


def test_overlap_is_over_tokens_that_have_experts():
    final = np.array([[[1, 1, 0], [0, 0, 1], [0, 0, 0]], [[0, 0, 0]] * 3], bool)
    np.testing.assert_array_equal(overlap(final, final), [1, 1])
    other = np.array([[[1, 0, 1], [0, 1, 0], [1, 1, 1]]] * 2, bool)
    np.testing.assert_array_equal(overlap(other, final), [0.25, 1])


CHECKPOINT = {name: [0.5, None] for name in LAYER_COLUMNS}
CHECKPOINT |= {"step": 6, "load": [[1, 1], [2, 0]], "mean_score": [[0.1, None], [1, 2]]}
ROUTING = {"tokens": 8, "kind": "aoe", "checkpoints": [CHECKPOINT]}


def test_files_of_choices(tmp_path):
    file = tmp_path / "routing.json"
    write_json(file, ROUTING)
    (last,) = read_choices(file)["checkpoints"]
    np.testing.assert_array_equal(last["mean_score"], [[0.1, np.nan], [1, 2]])
    for damaged in ([], [CHECKPOINT | {"load": [[1], [2, 0]]}], [{"step": 6}]):
        write_json(file, ROUTING | {"checkpoints": damaged})
        with pytest.raises(UserError, match="routing.json cannot be read: .*Error: .*; remove it"):
            read_choices(file)
    write_json(file, {"machines": []})
    with pytest.raises(UserError, match="routing.json cannot be read: tokens is None.*; remove it"):
        read_choices(file)
