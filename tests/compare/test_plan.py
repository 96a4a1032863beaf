"""Plans of whole suites; how one configuration is planned is tested in tests/test_plan.py."""

import pytest

from aoe_jax.compare.plan import first_runs, row
from aoe_jax.compare.suite import load_suite
from aoe_jax.errors import UserError
from aoe_jax.sharding import fill_mesh
from tests.runs import ROOT, run

PAPER = ROOT / "configs/compare/paper.py"


@pytest.mark.parametrize(
    ("size", "n_arms", "accumulate", "n_chips"), [("732M", 16, 32, 16), ("4B", 2, 4, 256)]
)
def test_every_arm_of_the_paper_takes_the_mesh_that_is_documented(
    size, n_arms, accumulate, n_chips
):
    suite = load_suite(PAPER, ["mesh.fsdp=16", f"train.accumulate={accumulate}"])
    runs = first_runs(suite, [size])
    assert len(runs) == n_arms
    assert {fill_mesh(run.config, n_chips).mesh.data for run in runs} == {n_chips // 16}
    assert all(run.config.checkpoint.keep_every > 0 for run in runs)


def test_sizes_are_those_of_the_suite():
    suite = load_suite(ROOT / "configs/compare/tiny.py")
    assert {(run.size, run.seed) for run in first_runs(suite, [])} == {("d24", 0), ("d48", 0)}
    with pytest.raises(UserError, match="--sizes=d24,d25: d25 is unknown; choose one of d24, d48"):
        first_runs(suite, ["d24", "d25"])


def test_an_arm_in_a_row():
    figure = {
        "fits": False,
        "memory_bytes": {"state": 1e9, "total": 17.5e9},
        "flops": {"compiled": None, "useful": 2.0},
        "collective_bytes": {"psum": 1e9, "all_gather": 2e9},
        "likely_step_seconds": None,
        "step_seconds": 0.5,
        "bound_by": "network",
        "mfu_bound": 0.25,
    }
    cells = [
        "it",
        "NO",
        "17.50 (1.00)",
        "not counted",
        "3.0",
        "unknown",
        "0.500 s, network",
        "0.25",
    ]
    assert list(row("it", figure).values()) == cells
    figure["likely_step_seconds"], figure["flops"]["compiled"] = 0.75, 2.2
    assert row("it", figure)["likely step"] == "0.750 s"
    assert row("it", figure)["compiled / useful FLOPs"] == "1.100"


def test_mistakes_end_with_status_2():
    for arguments, words in (
        (["--suite=configs/compare/tiny.py"], "--topology is missing"),
        (["--topology=v5e:2x2"], "--suite is missing"),
    ):
        status, _, stderr = run(["-m", "aoe_jax.compare.plan", *arguments])
        assert status == 2 and words in stderr and "Traceback" not in stderr, stderr
