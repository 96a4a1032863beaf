"""Comparisons of any two arms from the `runs.csv` of a report."""

import pandas as pd
import pytest

from aoe_jax.compare.pair import pair_table
from aoe_jax.errors import UserError
from tests.in_process import call
from tests.runs import ROOT

SMALL = ROOT / "results/small"


def write_runs(folder, *rows):
    columns = ["size", "arm", "seed", "validation_nll", "state"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "runs.csv")


def done(*row):
    return (*row, "finished")


def test_differences_are_paired_by_seed(tmp_path):
    rows = [done("s", "a", seed, nll) for seed, nll in enumerate((3.0, 3.2, 9.0))]
    rows += [done("s", "b", 1, 3.1), done("s", "b", 0, 2.8), ("s", "b", 2, "", "failed")]
    write_runs(tmp_path, *rows, done("t", "a", 0, 2.0), done("u", "b", 0, 1.0))
    _, _, row = pair_table(tmp_path, ["a", "b"]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # By Student's t with one degree of freedom the interval is 12.706 standard errors wide.
    difference = "+0.1500 ± 0.0500 [-0.4853, +0.7853]"
    assert cells == ["s", "3.1000 ± 0.1000", "2.9500 ± 0.1500", difference, "0.2", "2"]


def test_the_command_prints_the_differences_of_the_committed_results(capsys):
    call("aoe_jax.compare", f"--workdir={SMALL}", "--arms=aoe_d3_free,moe_free")
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    wanted = ("+0.0181 ± 0.0397", "+0.0538 ± 0.0161", "+0.0293 ± 0.0137")
    assert len(rows) == 3
    assert all(words in row for row, words in zip(rows, wanted, strict=True))


def test_wrong_arms_and_folders(tmp_path):
    for arms in (["moe_aux"], ["moe_aux", "moe_aux"], ["moe_aux", "aoe"]):
        words = f"--arms={','.join(arms)}: name two of the finished arms: moe_aux, moe_free"
        with pytest.raises(UserError, match=words):
            pair_table(SMALL, arms)
    with pytest.raises(UserError, match=r"runs\.csv cannot be read \(No such file or directory\)"):
        pair_table(tmp_path, ["a", "b"])
    write_runs(tmp_path, done("s", "a", 0, 3.0), done("s", "b", 1, 3.0), done("t", "b", 0, 3.0))
    with pytest.raises(UserError, match="--arms=a,b: no size and seed has finished runs of both"):
        pair_table(tmp_path, ["a", "b"])
    for content in (b"step,loss\n1,2\n", b"", b"\xff\xfe", b"state,size,arm,seed\nfinished,s,a,0"):
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(UserError, match="name the folder of a report"):
            pair_table(tmp_path, ["a", "b"])
