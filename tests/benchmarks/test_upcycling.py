"""The table of the upcycling benchmark."""

import pytest

from benchmarks.upcycling import rows


def test_differences_are_of_pairs():
    """Seeds that differ as a whole do not add to the error of a difference."""
    of_seeds = [
        {"dense": {0: 5.0, 9: 4.0}, "MoE": {0: 5.0, 9: 3.9}, "AoE": {0: 5.0, 9: 3.8}},
        {"dense": {0: 7.0, 9: 6.0}, "MoE": {0: 7.0, 9: 5.9}, "AoE": {0: 7.0, 9: 5.6}},
    ]
    first, last = rows(of_seeds)
    assert first["steps"] == 0 and first["AoE - dense"] == "+0.0000 ± 0.0000"
    assert (last["steps"], last["dense"], last["MoE"]) == (9, "5.0000", "4.9000")
    assert last["MoE - dense"] == "-0.1000 ± 0.0000"
    mean, error = map(float, last["AoE - dense"].split(" ± "))
    assert (mean, error) == pytest.approx((-0.3, 0.1))
