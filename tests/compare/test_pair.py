"""Comparisons of any two arms from the `runs.csv` of a report."""

import pandas as pd
import pytest

from aoe_jax.compare.pair import finished_runs, pairs
from aoe_jax.errors import UserError
from tests.in_process import call
from tests.runs import ROOT

SMALL = ROOT / "results/small"


def frame(*rows):
    return pd.DataFrame(rows, columns=["size", "arm", "seed", "validation_nll", "state"])


def done(*row):
    return (*row, "finished")


def test_differences_are_paired_by_seed(tmp_path):
    rows = [done("s", "a", seed, nll) for seed, nll in enumerate((3.0, 3.2, 9.0))]
    rows += [done("s", "b", 1, 3.1), done("s", "b", 0, 2.8), ("s", "b", 2, "", "failed")]
    rows += [done("t", "a", 0, 2.0), done("u", "b", 0, 1.0)]
    frame(*rows).to_csv(tmp_path / "runs.csv")
    ((size, nlls, difference),) = pairs(finished_runs(tmp_path), ["a", "b"])
    assert (size, difference.n) == ("s", 2)
    assert [nll.value for nll in nlls] == pytest.approx([3.1, 2.95])
    assert difference.value == pytest.approx(0.15)
    reach = 12.706 * 0.05  # by Student's t with one degree of freedom
    assert (difference.low, difference.high) == pytest.approx((0.15 - reach, 0.15 + reach), 1e-4)


def test_the_command_prints_the_differences_of_the_committed_results(capsys):
    call("aoe_jax.compare.pair", f"--results={SMALL}", "--arms=aoe_d3_free,moe_free")
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    wanted = ("+0.0181 ± 0.0397", "+0.0538 ± 0.0161", "+0.0293 ± 0.0137")
    assert len(rows) == 3
    assert all(words in row for row, words in zip(rows, wanted, strict=True))


def test_wrong_arms():
    for arms in (["moe_aux"], ["moe_aux", "moe_aux"], ["moe_aux", "aoe"]):
        words = f"--arms={','.join(arms)}: name two arms with finished runs, of moe_aux, moe_free"
        with pytest.raises(UserError, match=words):
            pairs(finished_runs(SMALL), arms)
    rows = [done("s", "a", 0, 3.0), done("s", "b", 1, 3.0), done("t", "b", 0, 3.0)]
    with pytest.raises(UserError, match="--arms=a,b: no size and seed has both"):
        pairs(frame(*rows), ["a", "b"])


def test_a_folder_without_results(tmp_path):
    with pytest.raises(UserError, match=r"runs\.csv cannot be read \(No such file or directory\)"):
        finished_runs(tmp_path)
    for content in (b"step,loss\n1,2\n", b"", b"\xff\xfe", b"state,size,arm,seed\nfinished,s,a,0"):
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(UserError, match="name the folder of a report"):
            finished_runs(tmp_path)
