"""Suites and sweeps: their configurations, and what is refused."""

import dataclasses

import pytest

from aoe_jax.compare.suite import Arm, Size, Suite, Sweep, load_suite
from aoe_jax.config.experts import matched_width
from aoe_jax.errors import UserError
from aoe_jax.model.counts import parameter_counts
from configs import tiny
from configs.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe
from tests.in_process import execute
from tests.runs import ROOT

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "free"), "dense": DENSE, "active": DENSE_ACTIVE}
SMALL = Size({"model": {"d_model": 64}, "experts": {"d_ffn": 96}}, seeds=2)
TINY = ROOT / "configs/compare/tiny.py"


def suite(**changes):
    values = {"name": "s", "base": tiny.get_config("published"), "arms": ARMS, "baseline": "moe"}
    return Suite(**values | {"sizes": {"small": SMALL}} | changes)


def test_runs_resolve_to_configurations():
    wide = Size({"train": {"rate_width": 64}}, seeds=1, arms=("moe", "aoe"))
    base = tiny.get_config("published")
    base.train.seed = 7
    more = dataclasses.replace(SMALL, seeds=1, seeds_of={"aoe": 3, "moe": 9})
    runs = suite(base=base, sizes={"small": more, "wide": wide}).of_arms(["active"]).runs()
    assert [run.name for run in runs] == ["small/moe/seed_7", "small/active/seed_7"]
    runs = suite(base=base, sizes={"small": more, "wide": wide}).of_arms(["aoe"]).runs()
    small = [f"small/{arm}/seed_{seed}" for seed in (7, 8, 9) for arm in ("moe", "aoe")]
    assert [run.name for run in runs] == [*small, "wide/moe/seed_7", "wide/aoe/seed_7"]
    runs = suite(base=base, sizes={"small": SMALL, "wide": wide}).runs()
    names = [*(f"small/{arm}/seed_{seed}" for seed in (7, 8) for arm in ARMS)]
    assert [run.name for run in runs] == [*names, "wide/moe/seed_7", "wide/aoe/seed_7"]
    by_name = {run.name: run.config for run in runs}
    free = by_name["small/aoe/seed_8"]
    assert (free.experts.kind, free.experts.d_low, free.train.seed) == ("aoe", 16, 8)
    assert (free.balance.aux_weight, free.balance.bias_rate) == (0.0, 0.01)
    assert free.experts.width(64) == matched_width(64, 96, 16)
    assert by_name["small/dense/seed_7"].experts.d_ffn == 8 * 96
    totals = {arm: parameter_counts(by_name[f"small/{arm}/seed_7"]).total for arm in ARMS}
    for arm in ("aoe", "dense"):
        assert totals[arm] == pytest.approx(totals["moe"], rel=0.01)
    assert totals["active"] < 0.7 * totals["moe"]  # it is marked matched=False
    assert [by_name[f"{size}/moe/seed_7"].rate_factor for size in ("small", "wide")] == [1, 0.5]


def refused(words, function, *args, **kwargs):
    with pytest.raises(UserError, match=words):
        function(*args, **kwargs)


def arm(name, **groups):
    return {"arms": ARMS | {name: Arm(name, {"experts": {"kind": "router"}} | groups)}}


WIDE = {"kind": "router", "d_ffn": 500}
TWIN = {"twin": dataclasses.replace(ARMS["aoe"], reference="nobody")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (arm("wide", experts=WIDE), "size small: arm wide .* 1% apart.* matched=False"),
        (arm("bad", experts={"top_k": 9}), "size small, arm bad.* config.experts.top_k=9"),
        (arm("bad", train={"stepz": 1}), "arm bad.* config.train.stepz is unknown"),
        (arm("longer", train={"batch_size": 16}), "another config.train.batch_size than moe"),
        (arm("a/b"), "name='a/b': must have letters"),
        ({"arms": ARMS | TWIN}, r"sizes\['small'\].arms='nobody': choose one of moe, aoe"),
        ({"baseline": "none"}, "arms='none': choose one of moe, aoe"),
        ({"sizes": {}}, "sizes={}: must not be empty"),
        ({"sizes": {"small": Size({}, 0)}}, r"sizes\['small'\].seeds=0"),
        ({"sizes": {"small": Size({}, 1, arms=("aoe",))}}, "arms='moe': is the baseline"),
        (
            {"sizes": {"small": Size({}, 1, seeds_of={"a": 1})}},
            "seeds_of='a': choose one of moe",
        ),
        ({"sizes": {"small": Size({}, 1, seeds_of={"aoe": 0})}}, "seeds=0: must be a whole number"),
        ({"sizes": {"small": Size({}, 2.0)}}, r"seeds=2\.0: must be a whole number above 0"),
        (arm("typo", experts=3), "arm typo: its changes: TypeError"),
    ],
)
def test_impossible_suites(changes, words):
    refused(words, lambda: suite(**changes).runs())


def test_files_without_a_suite(tmp_path):
    file = tmp_path / "suite.py"
    refused(rf"--suite={file}.* cannot be read \(no such file\)", load_suite, file)
    for text, words in (
        ("x = 1\n", r"has no function get_suite\(\)"),
        ("def get_suite():\n    return 3\n", r"get_suite\(\) must return .*Suite"),
    ):
        file.write_text(text)
        refused(f"--suite={file}.* {words}", load_suite, file)


def test_mistakes_on_the_command_line_end_with_status_2(tmp_path):
    for argument, words in (
        ("--report", "has no runs to report"),
        ("--set=train.stepz=1", "config.train.stepz is unknown"),
        ("--arms=moe_aux,nobody", "--arms=nobody: choose one of moe_aux, moe_free"),
    ):
        command = ["-m", "aoe_jax.compare", f"--suite={TINY}", f"--workdir={tmp_path}/w", argument]
        status, _, stderr = execute(command)
        assert status == 2 and words in stderr and "Traceback" not in stderr, stderr
    assert not list((tmp_path / "w").glob("runs/*"))


def test_settings_change_all_runs():
    settings = ["train.steps=20", "data.name=lm1b", "train.learning_rate=0.5"]
    for run in load_suite(TINY, settings).runs():
        assert run.config.data.name == "lm1b"
        assert (run.config.train.steps, run.config.train.learning_rate) == (20, 0.5)
    small = ROOT / "configs/compare/small.py"
    refused("--set=train.steps: write it as GROUP.FIELD", load_suite, small, ["train.steps"])
    for setting in ("train.seed=7", "train.learning_rate=0.5", "experts.d_low=6"):
        refused(f"--set={setting}: the suite sets it", load_suite, small, [setting])


NO_SUITES = {"__init__", "arms", "scores"}


@pytest.mark.parametrize(
    "name",
    sorted({path.stem for path in (ROOT / "configs/compare").glob("*.py")} - NO_SUITES),
)
def test_every_suite_of_the_repository_resolves(name):
    suite = load_suite(ROOT / f"configs/compare/{name}.py")
    runs = suite.runs()
    assert len({run.name for run in runs}) == len(runs)
    assert all(suite.swept(sweep) for sweep in suite.throughput)


def swept(setting, values, arms=ARMS, of=None, **changes):
    sweep = Sweep(setting, values, SMALL.changes, of)
    return suite(arms=arms, sizes={}, throughput={"it": sweep}, **changes).swept("it")


def test_all_arms_of_a_sweep_have_the_value_and_equal_parameters():
    """The value wins over arms and settings."""
    found = swept("experts.n_experts", (4, 16))
    assert list(found) == [4, 16]
    for n, configs in found.items():
        assert configs["moe"].experts.n_experts == configs["aoe"].experts.n_experts == n
        assert configs["dense"].experts.d_ffn == n * 96
        totals = [parameter_counts(configs[arm]).total for arm in ("moe", "aoe", "dense")]
        assert max(totals) / min(totals) < 1.01
    found = swept("experts.d_low", (8, 24))
    assert [configs["aoe"].experts.d_low for configs in found.values()] == [8, 24]
    assert [configs["aoe"].experts.width(64) for configs in found.values()] == [132, 111]
    found = swept("train.batch_size", (2, 4), settings={"train": {"batch_size": 8}})
    assert [configs["dense"].tokens_per_step for configs in found.values()] == [2 * 256, 4 * 256]


@pytest.mark.parametrize(
    ("setting", "values", "changes", "words"),
    [
        ("rank", (1, 2), {}, "config.experts.rank is unknown"),
        ("top_k", (9, 2), {}, "throughput it, experts.top_k=9, arm moe"),
        ("top_k", (1, 2), {"of": ("aoe",)}, "arms='moe': is the baseline"),
        ("top_k", (1, 2), arm("wide", experts=WIDE), "it, experts.top_k=1: arm wide .*1% apart"),
    ],
)
def test_impossible_sweeps(setting, values, changes, words):
    refused(words, swept, f"experts.{setting}", values, **changes)
