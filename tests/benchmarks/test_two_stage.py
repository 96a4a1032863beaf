"""The two-stage classifier: its inputs, and the names of endings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.two_stage import (
    ENDINGS,
    Setting,
    draw_inputs,
    ending,
    of_first_expert,
    summary,
    train_seeds,
)


def test_classes_lie_apart():
    setting = Setting()
    label = jnp.repeat(jnp.arange(3), 1000)
    x = np.asarray(draw_inputs(jax.random.key(0), label, setting)).reshape(3, 1000, setting.d_model)
    means = x.mean(axis=1)
    np.testing.assert_allclose(means[0], -means[1], atol=0.2)
    np.testing.assert_allclose(means[2], 0, atol=0.2)
    along = (x - means[2]) @ (means[0] / np.linalg.norm(means[0]))
    np.testing.assert_allclose(along.std(axis=1), 1, atol=0.1)
    # Halfway between two classes either is more than three standard deviations away.
    middle = np.linalg.norm(means[0]) / 2
    assert middle > 3.5
    assert [(along > middle).mean().round(3) for along in along] == [1, 0, 0]
    assert [(along < -middle).mean().round(3) for along in along] == [0, 1, 0]


def test_endings_and_the_share_of_the_expert_of_class_1():
    for name, *shares in (
        ("apart", [0.95, 0.91, 0.05], [0.02, 0.0, 1.0]),
        ("one", [0.95, 0.91, 0.91]),
        ("spread", [0.95, 0.91, 0.5], [0.95, 0.0, 0.11]),
        ("other", [0.95, 0.0, 0.05], [0.95, 0.8, 0.05]),
    ):
        assert name in ENDINGS
        for share in map(np.array, shares):
            for first, second in ((share, 1 - share), (1 - share, share)):
                assert ending(np.stack([first, second], axis=1)) == name
    share = np.array([[[0.2, 0.8], [0.3, 0.7], [0.9, 0.1]], [[0.6, 0.4], [0.0, 1.0], [0.5, 0.5]]])
    np.testing.assert_array_equal(of_first_expert(share), [[0.8, 0.7, 0.1], [0.6, 0.0, 0.5]])


@pytest.mark.slow
def test_learns_and_repeats():
    setting = Setting(steps=150, d_model=8, held_out=200)
    outcome = train_seeds("aoe", False, setting, 2)
    assert outcome.share.shape == (2, 2, 3, 2) and outcome.accuracy.shape == (2, 2, 3)
    stages = summary("AoE", outcome)["stages"]
    # Class 3 is unknown in stage one, and learned in stage two.
    assert min(stages[0]["accuracy"]["mean"][:2]) > 0.95 and stages[0]["accuracy"]["mean"][2] < 0.1
    assert min(stages[1]["accuracy"]["mean"]) > 0.9
    # Norms of x and -x are equal.
    share = np.array([stage["share_of_first_expert"]["mean"] for stage in stages])
    np.testing.assert_allclose(share[:, 0], share[:, 1], atol=0.1)
    again = train_seeds("aoe", False, setting, 2)
    jax.tree.map(np.testing.assert_array_equal, outcome, again)
