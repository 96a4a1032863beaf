"""Warnings, and the end of a run that diverges."""

import numpy as np
import pytest

from aoe_jax.errors import DivergedError
from aoe_jax.training.health import SPIKE_MINIMUM, Health


def noisy(health, steps, first=1):
    losses = np.random.default_rng(0).normal(3, 0.05, steps)
    for step, loss in enumerate(losses, first):
        health.step(step, loss, 1.0, True)


def test_skipped_steps_in_a_row_end_the_run(caplog):
    health = Health(3, batch_size=4)
    for step, finite in enumerate([False, False, True, False, False], 1):
        health.step(step, np.nan if not finite else 1.0, np.inf, finite)
        assert (health.skipped_in_row > 0) == (not finite)
    assert (
        "step 5 skipped: loss nan, gradient norm inf; its batch is number 5, sequences 16 to 19"
        in caplog.text
    )
    with pytest.raises(
        DivergedError, match=r"stopped at step 6: the last 3 updates.*train\.max_skipped=3"
    ):
        health.step(6, np.nan, np.nan, False)


def test_skipped_steps_before_a_stop_count(caplog):
    health = Health(3, batch_size=4, skipped_in_row=2)
    with pytest.raises(DivergedError, match="the last 3 updates"):
        health.step(6, np.nan, np.nan, False)


def test_loss_spike(caplog):
    health = Health(3, batch_size=4)
    noisy(health, 200)
    assert not caplog.text
    health.step(201, 3.5, 17.0, True)
    assert "loss spike at step 201: 3.5000, the last 128 steps had 2.99" in caplog.text
    assert "gradient norm 17" in caplog.text


def test_first_steps_and_skipped_ones_are_no_spike(caplog):
    health = Health(9, batch_size=4)
    noisy(health, SPIKE_MINIMUM - 1)
    health.step(SPIKE_MINIMUM, 9.0, 1.0, True)
    assert "spike" not in caplog.text
    health = Health(9, batch_size=4)
    noisy(health, 100)
    health.step(101, np.nan, 1.0, False)
    noisy(health, 10, first=102)
    assert "spike" not in caplog.text


def test_dead_experts_are_named_once(caplog):
    health = Health(3, batch_size=4)
    load = np.array([[0.5, 0.0, 1.5], [1.0, 0.5, 0.5]])
    alive = np.full((2, 3), 2 / 3)
    for step, now in enumerate([load, load, alive, load, load], 1):
        health.load(step, now)
    assert not caplog.text
    health.load(6, load)
    assert (
        "dead experts at step 6, without a token in 3 logged steps: layer 0 expert 1 "
        "(1 of 6 in all)" in caplog.text
    )
    caplog.clear()
    health.load(7, load)
    assert not caplog.text
    health.load(8, alive)
    for step in (9, 10, 11):
        health.load(step, load)
    assert "dead experts at step 11" in caplog.text


def test_a_free_place_is_no_dead_expert(caplog):
    health, live = Health(3, batch_size=4), np.array([[1.0, 0, 1], [1, 1, 1]])
    load = np.array([[0.5, 0.0, 1.5], [1.0, 1.0, 0.0]])
    for step in range(5):
        health.load(step, load, live)
    assert "layer 1 expert 2 (1 of 6 in all)" in caplog.text


def test_dense_model_has_no_dead_expert(caplog):
    health = Health(3, batch_size=4)
    for step in range(5):
        health.load(step, np.zeros((2, 1)))
    assert not caplog.text
