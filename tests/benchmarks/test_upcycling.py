"""The table of the upcycling benchmark."""

import pytest
from absl import flags

from aoe_jax.errors import UserError
from benchmarks import upcycling
from benchmarks.upcycling import check_flags, rows


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


def test_runs_of_other_flags_are_not_taken_up(tmp_path, monkeypatch):
    given = flags.FlagValues()
    flags.DEFINE_integer("steps", 400, "", flag_values=given)
    given.mark_as_parsed()
    monkeypatch.setattr(upcycling, "DECIDING", ("steps",))
    monkeypatch.setattr(flags, "FLAGS", given)
    check_flags(tmp_path / "runs")
    check_flags(tmp_path / "runs")
    given.steps = 500
    with pytest.raises(UserError, match=r"--output=.*runs: has runs with other flags, .*400"):
        check_flags(tmp_path / "runs")
