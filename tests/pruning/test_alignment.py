"""Experts aligned: the same function in the form of another."""

import numpy as np
import pytest

from aoe_jax.pruning.alignment import aligned
from tests.pruning.experts import SHAPES, disguised, draw, output

X = np.random.default_rng(9).normal(size=(30, 16))
KINDS = pytest.mark.parametrize("kind", SHAPES)


def same_function(a, b):
    for one, other in zip(output(a, X), output(b, X), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


@KINDS
def test_a_disguise_is_seen_through(kind):
    expert = draw(kind)
    hidden = disguised(expert, seed=5)
    same_function(expert, hidden)
    assert max(np.abs(hidden[name] - expert[name]).max() for name in expert) > 0.5
    found = aligned(expert, hidden)
    for name in expert:
        np.testing.assert_allclose(found[name], expert[name], atol=1e-10)


@KINDS
def test_what_an_expert_computes_stays(kind):
    """Aligned to one that has nothing in common with it; it comes nearer all the same."""
    reference, expert = draw(kind), draw(kind, seed=1)
    found = aligned(reference, expert)
    same_function(found, expert)

    def likeness(other):
        return sum(np.vdot(reference[name], other[name]) for name in reference)

    assert likeness(found) > likeness(expert) + 5


def test_the_order_of_hidden_units_alone_does_not_suffice():
    """The average of an AoE expert and a rotated copy has smaller norms, unless the rotation is
    undone.
    """
    expert = draw("aoe")
    hidden = disguised(expert, seed=5)
    norms = output(expert, X)[1]
    plain = np.linalg.norm(X @ (expert["w_down"] + hidden["w_down"]) / 2, axis=1) / norms
    undone = (
        np.linalg.norm(X @ (expert["w_down"] + aligned(expert, hidden)["w_down"]) / 2, axis=1)
        / norms
    )
    assert plain.mean() < 0.85
    np.testing.assert_allclose(undone, 1, atol=1e-10)
