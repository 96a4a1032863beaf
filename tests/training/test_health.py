"""Warnings, and the end of a run that diverges."""

import numpy as np
import pytest

from aoe_jax.config.training import TrainConfig
from aoe_jax.errors import DivergedError
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.health import SPIKE_MINIMUM, Health


def new_health(skipped=0):
    config = TrainConfig(max_skipped=3, batch_size=4)
    return Health(config, Progress(skipped_in_row=skipped))


def noisy(health, steps, first=1):
    losses = np.random.default_rng(0).normal(3, 0.05, steps)
    for step, loss in enumerate(losses, first):
        health.step(step, loss, 1.0, True)


def test_skipped_steps_in_a_row_end_the_run(caplog):
    health = new_health()
    for step, finite in enumerate([False, False, True, False, False], 1):
        health.step(step, 1.0 if finite else np.nan, np.inf, finite)
    words = "step 5 skipped: loss nan, gradient norm inf; its batch has the sequences 16 to 19"
    assert words in caplog.text
    words = r"stopped at step 6: the last 3 updates.*train\.max_skipped=3"
    for skipping in (health, new_health(skipped=2)):  # those before a stop count
        with pytest.raises(DivergedError, match=words):
            skipping.step(6, np.nan, np.nan, False)


def test_loss_spike(caplog):
    health = new_health()
    noisy(health, 200)
    assert not caplog.text
    health.step(201, 3.5, 17.0, True)
    assert "loss spike at step 201: 3.5000, the last 128 steps had 2.99" in caplog.text
    assert "gradient norm 17" in caplog.text


def test_first_steps_and_skipped_ones_are_no_spike(caplog):
    health = new_health()
    noisy(health, SPIKE_MINIMUM - 1)
    health.step(SPIKE_MINIMUM, 9.0, 1.0, True)
    health = new_health()
    noisy(health, 100)
    health.step(101, np.nan, 1.0, False)
    noisy(health, 10, first=102)
    assert "spike" not in caplog.text


def test_dead_experts_are_named_once(caplog):
    health, live = new_health(), np.array([[1, 1, 1], [1, 1, 0]])  # a free place is not dead
    load = np.array([[0.5, 0.0, 1.5], [1.0, 1.0, 0.0]])
    alive = np.full((2, 3), 2 / 3)
    for step, now in enumerate([load, load, alive, load, load], 1):
        health.load(step, now, live)
    assert not caplog.text
    health.load(6, load, live)
    words = "dead experts at step 6, without a token in 3 logged steps: layer 0 expert 1 (1 of 6"
    assert words in caplog.text
    caplog.clear()
    health.load(7, load, live)
    assert not caplog.text
    for step, now in enumerate([alive, load, load, load], 8):
        health.load(step, now, live)
    assert "dead experts at step 11" in caplog.text


def test_dense_model_has_no_dead_expert(caplog):
    health = new_health()
    for step in range(5):
        health.load(step, np.zeros((2, 1)))
    assert not caplog.text
