"""Any two arms from the committed results of a suite, and missing ones."""

import pandas as pd
import pytest

from aoe_jax.compare.pair import finished_runs, pairs
from aoe_jax.errors import UserError
from tests.runs import ROOT, run

SMALL = ROOT / "results/small"


def row(size, arm, seed, nll, state="finished"):
    return {"size": size, "arm": arm, "seed": seed, "state": state, "validation_nll": nll}


def test_differences_are_of_the_seeds_that_both_have():
    rows = [
        row("s", "a", 0, 3.0),
        row("s", "a", 1, 3.2),
        row("s", "a", 2, 9.0),
        row("s", "b", 1, 3.1),
        row("s", "b", 0, 2.8),
    ]
    rows += [row("t", "a", 0, 2.0), row("u", "b", 0, 1.0)]
    found = pairs(pd.DataFrame(rows), ["a", "b"])
    ((size, nlls, difference),) = found
    assert (size, difference.n) == ("s", 2)
    assert [nll.value for nll in nlls] == pytest.approx([3.1, 2.95])
    assert difference.value == pytest.approx(0.15)
    assert (difference.low, difference.high) == pytest.approx(
        (0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05), rel=1e-4
    )


def test_runs_that_have_not_finished_do_not_count(tmp_path):
    rows = [row("s", "a", 0, 3.0), row("s", "b", 0, "", state="failed")]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv")
    (found,) = finished_runs(tmp_path).to_dict("records")
    assert found == {"size": "s", "arm": "a", "seed": 0, "validation_nll": 3.0}


def test_what_the_results_say_of_loss_free_balancing():
    status, stdout, stderr = run(
        ["-m", "aoe_jax.compare.pair", "--results=results/small", "--arms=aoe_d3_free,moe_free"]
    )
    assert status == 0, stderr
    lines = stdout.strip().splitlines()
    assert len(lines) == 2 + len(pairs(finished_runs(SMALL), ["aoe_d3_free", "moe_free"])) == 5
    for line, said in zip(
        lines[2:], ("+0.0181 ± 0.0397", "+0.0538 ± 0.0161", "+0.0293 ± 0.0137"), strict=True
    ):
        assert said in line


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["moe_aux"], "--arms=moe_aux: name two arms"),
        (["moe_aux", "moe_aux"], "name two arms"),
        (["moe_aux", "aoe"], "aoe has finished no run there; choose one of moe_aux, moe_free"),
    ],
)
def test_arms_are_two_that_are_there(arms, words):
    with pytest.raises(UserError, match=words):
        pairs(finished_runs(SMALL), arms)


def test_arms_without_a_run_in_common():
    with pytest.raises(UserError, match="--arms=a,b: no size and seed has both"):
        rows = [row("s", "a", 0, 3.0), row("s", "b", 1, 3.0), row("t", "b", 0, 3.0)]
        pairs(pd.DataFrame(rows), ["a", "b"])


def test_a_folder_without_results(tmp_path):
    with pytest.raises(UserError, match=r"runs\.csv cannot be read \(No such file or directory\)"):
        finished_runs(tmp_path)
    for content in (b"step,loss\n1,2\n", b"", b"\xff\xfe", b"state,size,arm,seed\nfinished,s,a,0"):
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(UserError, match="name the folder of a report"):
            finished_runs(tmp_path)


def test_mistakes_end_with_status_2():
    status, _, stderr = run(["-m", "aoe_jax.compare.pair", "--results=results"])
    assert status == 2 and "--arms is missing" in stderr and "Traceback" not in stderr, stderr
