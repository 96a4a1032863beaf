"""Which suites and sweeps there can be, and the configurations of their runs."""

import dataclasses
import json

import pytest

from aoe_jax.compare.suite import Arm, Size, Suite, Sweep, Tuning, load_suite
from aoe_jax.config.experts import matched_width
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.counts import parameter_counts
from aoe_jax.moe.grouped_matmul import _that_takes
from aoe_jax.storage.config_files import read_config
from configs import tiny
from configs.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe
from tests.runs import ROOT, run, tiny_config

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "free"), "dense": DENSE, "active": DENSE_ACTIVE}
SMALL = Size({"model": {"d_model": 64}, "experts": {"d_ffn": 96}}, seeds=2)


def suite(**changes):
    values = {
        "name": "s",
        "base": tiny.get_config(),
        "arms": ARMS,
        "sizes": {"small": SMALL},
        "baseline": "moe",
    }
    return Suite(**values | changes)


def test_runs_resolve_to_configurations():
    runs = suite().runs()
    assert [run.name for run in runs[:5]] == [
        "small/moe/seed_0",
        "small/aoe/seed_0",
        "small/dense/seed_0",
        "small/active/seed_0",
        "small/moe/seed_1",
    ]
    by_name = {run.name: run.config for run in runs}
    free = by_name["small/aoe/seed_1"]
    assert (free.experts.kind, free.experts.d_low, free.train.seed) == ("aoe", 16, 1)
    assert (free.balance.aux_weight, free.balance.bias_rate) == (0.0, 0.01)
    assert free.experts.width(64) == matched_width(64, 96, 16)
    assert by_name["small/dense/seed_0"].experts.d_ffn == 8 * 96
    totals = {arm: parameter_counts(by_name[f"small/{arm}/seed_0"]).total for arm in ARMS}
    assert (
        abs(totals["aoe"] / totals["moe"] - 1) < 0.01
        and abs(totals["dense"] / totals["moe"] - 1) < 0.01
    )
    assert totals["active"] < 0.7 * totals["moe"]  # said not to be matched


def test_a_learning_rate_of_the_tuning_moves_the_final_one_too():
    config = suite().runs({"moe": 1e-3})[0].config
    assert config.train.learning_rate == 1e-3 and config.train.final_learning_rate == pytest.approx(
        2e-4 / 5
    )


def test_a_size_may_have_a_part_of_the_learning_rate():
    wide = suite(sizes={"small": SMALL, "wide": Size({}, 1, rate_factor=0.5)})
    rates = {
        run.size: run.config.train.learning_rate
        for run in wide.runs({"moe": 1e-3})
        if run.arm == "moe"
    }
    assert rates == {"small": 1e-3, "wide": 5e-4}
    own = {run.size: run.config.train for run in wide.runs() if run.arm == "moe"}
    for rate in ("learning_rate", "final_learning_rate"):  # also of the configured one
        assert getattr(own["wide"], rate) == getattr(own["small"], rate) / 2
    with pytest.raises(UserError, match=r"sizes\['wide'\].rate_factor=0: must be greater than 0"):
        suite(sizes={"wide": Size({}, 1, rate_factor=0)})


def test_tuning_runs_are_short_and_of_the_first_size():
    of_two = suite(sizes={"small": SMALL, "large": Size({}, 1)}, tuning=Tuning((1e-3, 3e-3), 60))
    runs = of_two.tuning_runs()
    assert len(runs) == 2 * len(ARMS)
    config = runs["aoe", 3e-3].config
    assert (config.train.learning_rate, config.train.steps, config.model.d_model) == (3e-3, 60, 64)
    assert config.train.seed not in {run.config.train.seed for run in of_two.runs()}
    elsewhere = dataclasses.replace(of_two, tuning=Tuning((1e-3, 3e-3), 60, size="large"))
    assert elsewhere.tuning_runs()["aoe", 3e-3].config.model.d_model == 128


def test_sizes_may_leave_out_arms():
    runs = suite(sizes={"small": SMALL, "large": Size({}, 1, arms=("moe", "aoe"))}).runs()
    assert [run.arm for run in runs if run.size == "large"] == ["moe", "aoe"]


def wide(factor):
    return Arm("wide", {"experts": {"kind": "router", "d_ffn": factor}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"arms": ARMS | {"wide": wide(120)}},
            ["size small", "arm wide", "1% apart", "matched=False"],
        ),
        (
            {"arms": ARMS | {"bad": Arm("bad", {"experts": {"top_k": 9}})}},
            ["size small, arm bad", "experts.top_k=9"],
        ),
        (
            {"arms": ARMS | {"bad": Arm("bad", {"train": {"stepz": 1}})}},
            ["arm bad", "config.train.stepz is unknown"],
        ),
        ({"arms": ARMS | {"a/b": wide(96)}}, ["arms", "a/b", "letters"]),
        ({"arms": {}}, ["arms", "at least one Arm"]),
        ({"baseline": "none"}, ["baseline='none'", "moe, aoe"]),
        ({"sizes": {"small": Size({}, 0)}}, ["sizes['small'].seeds=0"]),
        ({"tuning": Tuning((1e-3,), 60, size="big")}, ["tuning.size='big'", "choose one of small"]),
        (
            {"sizes": {"small": Size({}, 1, rate_factor=0.5)}, "tuning": Tuning((1e-3,), 60)},
            ["sizes['small'].rate_factor=0.5", "must be 1"],
        ),
        ({"sizes": {"small": Size({}, 1, arms=("aoe",))}}, ["must have the baseline 'moe'"]),
    ],
)
def test_what_no_suite_can_be(changes, words):
    with pytest.raises(UserError) as e:
        suite(**changes).runs()
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be read (no such file)", "configs/compare/tiny.py"]),
        ("x = 1\n", ["has no function get_suite()"]),
        ("def get_suite():\n    return 3\n", ["get_suite() must return", "Suite"]),
    ],
)
def test_files_that_are_no_suite(tmp_path, text, words):
    file = tmp_path / "suite.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as e:
        load_suite(file)
    assert all(word in str(e.value) for word in [f"--suite={file}", *words]), e.value


def test_mistakes_on_the_command_line_end_with_status_2(tmp_path):
    suite = "--suite=configs/compare/tiny.py"
    for arguments, words in (
        ([suite, f"--workdir={tmp_path}/w", "--report"], "has no runs to report"),
        (
            [suite, f"--workdir={tmp_path}/w", "--set=train.stepz=1"],
            "config.train.stepz is unknown",
        ),
    ):
        status, _, stderr = run(["-m", "aoe_jax.compare", *arguments])
        assert status == 2 and words in stderr and "Traceback" not in stderr, stderr
    assert not list((tmp_path / "w").glob("runs/*"))


def test_arms_of_another_recipe_are_refused():
    longer = load_suite(ROOT / "configs/compare/tiny.py")
    arms = longer.arms | {
        "longer": Arm("longer", {"experts": {"kind": "router"}, "train": {"batch_size": 16}})
    }
    with pytest.raises(
        UserError, match=r"arm longer has another config\.train\.batch_size than moe_aux"
    ):
        dataclasses.replace(longer, arms=arms).runs()


def test_what_the_suite_sets_for_each_run_is_no_setting():
    with pytest.raises(UserError, match="--set=train.steps: write it as GROUP.FIELD=VALUE"):
        load_suite(ROOT / "configs/compare/small.py", ["train.steps"])
    for setting in ("train.seed=7", "train.learning_rate=0.5", "experts.d_low=6"):
        with pytest.raises(UserError, match=f"--set={setting}: the suite sets it for its runs"):
            load_suite(ROOT / "configs/compare/small.py", [setting])
    found = load_suite(ROOT / "configs/compare/tiny.py", ["train.learning_rate=0.5"])
    assert {run.config.train.learning_rate for run in found.runs()} == {0.5}


def test_settings_change_all_runs():
    found = load_suite(
        ROOT / "configs/compare/tiny.py", ["train.steps=20", "data.name=lm1b", "data.path=/data"]
    )
    assert {(run.config.train.steps, run.config.data.name) for run in found.runs()} == {
        (20, "lm1b")
    }


@pytest.mark.parametrize(
    "name",
    sorted({path.stem for path in (ROOT / "configs/compare").glob("*.py")} - {"arms", "__init__"}),
)
def test_every_suite_of_the_repository_resolves(name):
    suite = load_suite(ROOT / f"configs/compare/{name}.py")
    runs = suite.runs()
    assert len({run.name for run in runs}) == len(runs)
    assert all(suite.swept(sweep) for sweep in suite.throughput)


def test_all_arms_of_the_gpu_suite_have_the_kernel_of_the_gpu():
    for of in load_suite(ROOT / "configs/compare/gpu.py").runs():
        experts, dtype = of.config.experts, of.config.model.dtype
        sizes = experts.sizes(of.config.model.d_model)
        for d, f in ("df", "fd", *(("dr", "rf") if experts.low_rank else ())):
            backend = _that_takes("mosaic_gpu", dtype, sizes[d], sizes[f])
            assert backend == "mosaic_gpu", (of.name, d, f)


def test_a_saved_configuration_is_read_again(tmp_path):
    file = tmp_path / "config.json"
    config = tiny_config(experts__d_wide=40)
    file.write_text(json.dumps(config.to_dict()))
    assert Config.from_config_dict(read_config(str(file))) == config
    with pytest.raises(UserError, match=r"nothing\.json cannot be read"):
        read_config("nothing.json")


SWEPT_ARMS = {"moe": moe("aux"), "aoe": aoe(4, "free"), "dense": DENSE}
SWEPT_MODEL = {
    "model": {"n_layers": 1, "unroll": 1, "d_model": 64, "vocab_size": 512},
    "experts": {"d_ffn": 96},
}


def suite_of(sweep, **changes):
    return suite(**{"arms": SWEPT_ARMS, "sizes": {}, "throughput": {"it": sweep}} | changes)


def test_all_arms_have_the_value_and_equal_parameters():
    found = suite_of(Sweep("experts.n_experts", (4, 16), SWEPT_MODEL)).swept("it")
    assert list(found) == [4, 16]
    for n, configs in found.items():
        assert configs["moe"].experts.n_experts == configs["aoe"].experts.n_experts == n
        assert configs["dense"].experts.d_ffn == n * 96
        totals = {arm: parameter_counts(config).total for arm, config in configs.items()}
        assert max(totals.values()) / min(totals.values()) < 1.01


def test_the_value_wins_over_what_an_arm_says():
    sweep = Sweep("experts.d_low", (8, 24), SWEPT_MODEL)
    found = suite_of(sweep).swept("it")
    assert [configs["aoe"].experts.d_low for configs in found.values()] == [8, 24]
    assert [configs["aoe"].experts.width(64) for configs in found.values()] == [132, 111]
    sweep = Sweep("train.batch_size", (2, 4), SWEPT_MODEL)
    found = suite_of(sweep, settings={"train": {"batch_size": 8}}).swept("it")
    assert [sweep.position(configs["dense"]) for configs in found.values()] == [2 * 256, 4 * 256]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (
            Sweep("experts.d_ffn", (1, 2), {}),
            ["throughput['it'].setting='experts.d_ffn'", "experts.n_experts"],
        ),
        (Sweep("experts.top_k", (2,), {}), ["throughput['it'].values=(2,)", "two or more"]),
        (
            Sweep("experts.top_k", (9, 2), SWEPT_MODEL),
            ["throughput it, experts.top_k=9, arm moe", "experts.top_k=9"],
        ),
        (Sweep("experts.top_k", (1, 2), {}, arms=("aoe",)), ["must have the baseline 'moe'"]),
        (
            Sweep("experts.top_k", (1, 2), SWEPT_MODEL),
            ["throughput it, experts.top_k=1: arm wide", "1% apart"],
        ),
    ],
)
def test_what_no_sweep_can_be(sweep, words):
    wide = Arm("wide", {"experts": {"kind": "router", "d_ffn": 500}})
    with pytest.raises(UserError) as e:
        suite_of(sweep, arms=SWEPT_ARMS | {"wide": wide}).swept("it")
    assert all(word in str(e.value) for word in words), e.value


def test_without_sizes_there_must_be_a_sweep():
    with pytest.raises(UserError, match="sizes={}: must name at least one Size"):
        suite_of(None, throughput={})
