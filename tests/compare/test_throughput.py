"""What a step costs against settings: which configurations are measured, by the command from end to
end, and the report.
"""

import csv
import dataclasses
import re
import subprocess

import pytest

from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.arms import DENSE, aoe, moe
from aoe_jax.compare.document import to_markdown
from aoe_jax.compare.sections import styles_of
from aoe_jax.compare.suite import Arm, Size, Suite, load_suite
from aoe_jax.compare.sweep import Sweep
from aoe_jax.compare.throughput import measure_points, missing_points, read_costs, sweep_file
from aoe_jax.compare.throughput_sections import throughput
from aoe_jax.counts import parameter_counts
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json
from configs import tiny
from tests.compare.invented import invented_result
from tests.compare.suites import write_suite
from tests.hasty import xla_flags
from tests.runs import ROOT, finish, start

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "free"), "dense": DENSE}
SMALL = {
    "model": {"n_layers": 1, "unroll": 1, "d_model": 64, "vocab_size": 512},
    "experts": {"d_ffn": 96},
}


def suite_of(sweep, **changes):
    values = {"name": "s", "base": tiny.get_config(), "arms": ARMS, "sizes": {}, "baseline": "moe"}
    return Suite(**values | {"throughput": {"it": sweep}} | changes)


def test_all_arms_have_the_value_and_equal_parameters():
    found = suite_of(Sweep("experts.n_experts", (4, 16), SMALL)).swept("it")
    assert list(found) == [4, 16]
    for n, configs in found.items():
        assert configs["moe"].experts.n_experts == configs["aoe"].experts.n_experts == n
        assert configs["dense"].experts.d_ffn == n * 96
        totals = {arm: parameter_counts(config).total for arm, config in configs.items()}
        assert max(totals.values()) / min(totals.values()) < 1.01


def test_the_value_wins_over_what_an_arm_says():
    sweep = Sweep("experts.d_low", (8, 24), SMALL)
    found = suite_of(sweep).swept("it")
    assert [configs["aoe"].experts.d_low for configs in found.values()] == [8, 24]
    assert [configs["aoe"].experts.width(64) for configs in found.values()] == [132, 111]
    sweep = Sweep("train.batch_size", (2, 4), SMALL)
    found = suite_of(sweep, settings={"train": {"batch_size": 8}}).swept("it")
    assert [sweep.position(configs["dense"]) for configs in found.values()] == [2 * 256, 4 * 256]


def test_topologies_keep_the_batch_of_a_chip():
    changes = SMALL | {"train": {"batch_size": 3}}
    sweep = Sweep("topology", ("v5e:2x2", "v5p:2x2x4"), changes, arms=("moe", "aoe"))
    found = suite_of(sweep, settings={"mesh": {"fsdp": 2}, "train": {"accumulate": 3}}).swept("it")
    assert [sweep.position(configs["aoe"]) for configs in found.values()] == [4, 16]
    assert [configs["aoe"].train.batch_size for configs in found.values()] == [12, 48]
    assert {configs["moe"].train.accumulate for configs in found.values()} == {1}


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (
            Sweep("experts.d_ffn", (1, 2), {}),
            ["throughput['it'].setting='experts.d_ffn'", "experts.n_experts"],
        ),
        (Sweep("experts.top_k", (2,), {}), ["throughput['it'].values=(2,)", "two or more"]),
        (
            Sweep("experts.top_k", (9, 2), SMALL),
            ["throughput it, experts.top_k=9, arm moe", "experts.top_k=9"],
        ),
        (Sweep("topology", ("v5e", "v5e:2x2"), SMALL), ["topology='v5e'", "such as v5e:4x4"]),
        (Sweep("experts.top_k", (1, 2), {}, arms=("aoe",)), ["must have the baseline 'moe'"]),
        (
            Sweep("experts.top_k", (1, 2), SMALL),
            ["throughput it, experts.top_k=1: arm wide", "1% apart"],
        ),
    ],
)
def test_what_no_sweep_can_be(sweep, words):
    wide = Arm("wide", {"experts": {"kind": "router", "d_ffn": 500}})
    with pytest.raises(UserError) as e:
        suite_of(sweep, arms=ARMS | {"wide": wide}).swept("it")
    assert all(word in str(e.value) for word in words), e.value


def test_without_sizes_there_must_be_a_sweep():
    with pytest.raises(UserError, match="sizes={}: must name at least one Size"):
        suite_of(None, throughput={})


def test_machines_that_are_not_here_are_traced(tmp_path):
    changes = SMALL | {"train": {"batch_size": 2}, "data": {"seq_len": 32}}
    suite = suite_of(Sweep("topology", ("v5e:2x2", "v5e:2x4"), changes, arms=("moe",)))
    file = sweep_file(tmp_path, "it")
    file.parent.mkdir()
    measure_points(missing_points(suite, tmp_path, "it"), True, file)
    assert missing_points(suite, tmp_path, "it") == []
    found = read_json(file)
    del found["points"][0]["configs"]["moe"]["experts"]["ranks"]  # as if that field were new
    write_json(file, found)
    assert missing_points(suite, tmp_path, "it") == []
    costs = read_costs(suite, tmp_path, "it")["moe"]
    assert [(cost.x, cost.tokens) for cost in costs] == [(4, 4 * 64), (8, 8 * 64)]
    # FSDP: a chip receives all but its own share of the parameters, twice, and of their gradients.
    assert costs[1].received_bytes / costs[0].received_bytes == pytest.approx(
        (7 / 8) / (3 / 4), rel=0.02
    )
    assert all(cost.memory_bytes is None and cost.seconds > 0 for cost in costs)


SWEPT = (
    'sizes={}, throughput={"tokens": Sweep("train.batch_size", (2, 4), {}, arms=("moe", "aoe"))},'
)


def test_the_command_measures_what_is_missing_and_reports(tmp_path):
    """A suite that trains nothing; and the machine of an earlier version of the command."""
    file, work = tmp_path / "suite.py", tmp_path / "work"
    command = ["-m", "aoe_jax.compare", f"--suite={file}", f"--workdir={work}"]
    earlier = {
        "backend": "cpu",
        "device": "abacus",
        "cores": 1,
        "devices": 1,
        "python": "2",
        "jax": "0",
        "numpy": "1",
    }
    work.mkdir()
    write_json(work / "machine.json", earlier | {"jaxlib": "0", "flax": "0", "optax": "0"})

    suite = load_suite(write_suite(file, SWEPT))
    output = sweep_file(work, "tokens")
    output.parent.mkdir()
    figures = {arm: {"seconds": 1.0, "memory_bytes": 1e6} for arm in ("moe", "aoe")}
    write_json(
        output, {"points": [missing_points(suite, work, "tokens")[0] | {"figures": figures}]}
    )
    status, _, stderr = finish(start(command, XLA_FLAGS=xla_flags()))
    assert status == 0, stderr
    points = read_json(output)["points"]
    assert [point["value"] for point in points] == [2, 4] and points[0]["figures"] == figures
    assert 0 < points[1]["figures"]["aoe"]["seconds"] < 1
    machines = read_json(work / "machine.json")["machines"]
    assert len(machines) == 2 and machines[0]["device"] == "abacus"
    markdown = (work / "report.md").read_text()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(machines[1]["commit"].removesuffix("-dirty"))
    assert f"aoe_jax at {machines[1]['commit']}." in markdown
    assert (
        "Machine: abacus, 1 cores; python 2" in markdown
        and "took part one after another" in markdown
    )
    assert "## Throughput against settings" in markdown and "Failed" not in markdown
    assert "What is matched" not in markdown and "0 of 0" not in markdown
    with (work / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["x"]) for row in rows] == [
        ("moe", "64"),
        ("moe", "128"),
        ("aoe", "64"),
        ("aoe", "128"),
    ]
    of = {(row["arm"], row["x"]): row for row in rows}
    ratio = float(of["moe", "128"]["seconds_per_step"]) / float(
        of["aoe", "128"]["seconds_per_step"]
    )
    assert float(of["aoe", "128"]["speed_to_baseline"]) == pytest.approx(ratio)
    memory = float(of["aoe", "128"]["memory_bytes"]) / float(of["moe", "128"]["memory_bytes"])
    assert f"{ratio:.2f} / {memory:.2f} |" in markdown
    assert (
        re.search(r"figures/throughput_tokens\.png", markdown)
        and (work / "figures/throughput_tokens.svg").exists()
    )


def test_steps_are_held_against_those_of_as_many_experts(tmp_path):
    router = {"kind": "router"}
    arms = ARMS | {
        "few": Arm("few", {"experts": router | {"selection": "top_p"}}, reference="aoe"),
        "many": Arm("many", {"experts": router | {"selection": "top_p", "top_p": 0.9}}),
        "edge": Arm("edge", {"experts": router | {"selection": "top_p", "top_p": 0.1}}),
        "one": Arm(
            "one", {"experts": {"kind": "thor"}, "balance": {"aux_weight": 0.0}}, matched=False
        ),
    }
    others = {"wider": {"d_ffn": 104}, "three": {"top_k": 3}}
    sizes = {
        name: Size(SMALL | {"experts": SMALL["experts"] | changes}, seeds=1)
        for name, changes in others.items()
    }
    sizes["same"] = Size(SMALL, seeds=2)
    suite = suite_of(
        Sweep("experts.top_k", (1, 2, 4), SMALL, ("moe", "aoe")), arms=arms, sizes=sizes
    )
    file, seconds = (
        sweep_file(tmp_path, "it"),
        {"moe": {1: 1.0, 2: 1.5, 4: 2.5}, "aoe": {1: 1.0, 2: 2.0, 4: 4.0}},
    )
    file.parent.mkdir()
    points = [
        point
        | {
            "figures": {
                arm: {"seconds": of[point["value"]], "memory_bytes": 1.0}
                for arm, of in seconds.items()
            }
        }
        for point in missing_points(suite, tmp_path, "it")
    ]
    write_json(file, {"points": points})

    def load_of(arm, seed):
        """Of two layers; means over layers and seeds are 2, 3, 5 and, but for rounding, 1."""
        if arm == "edge":
            return 2 * [[0.5, 0.5 - 1e-9]]
        chosen = {"moe": 2, "aoe": 2, "few": 3, "many": 5}[arm] + seed - 0.5
        return [[chosen - 1, 0.5], [chosen - 0.5, 1]]

    def result(run):
        per_step = {
            "moe": 3.0,
            "aoe": 4.0,
            "few": 6.0,
            "many": 9.0,
            "edge": 2.0,
            "one": 4.0,
            "dense": 1.0,
        }[run.arm]
        routing = None
        if run.arm not in ("one", "dense"):
            routing = {"checkpoints": [{"load": [[9, 9]]}, {"load": load_of(run.arm, run.seed)}]}
        return invented_result(run, 5.0, seconds_per_step=per_step, routing=routing)

    def table(results):
        found = Comparison(suite, results)
        blocks = throughput(found, {"it": read_costs(suite, tmp_path, "it")}, styles_of(found))
        assert blocks[-3].text == "Steps at equal experts a token"
        return blocks[-1].rows

    results, moe, aoe = [result(run) for run in suite.runs()], ARMS["moe"].label, ARMS["aoe"].label
    few = ["same: few", "3.00", aoe, "1.50", "1.00"]
    assert table(results) == [
        few,
        ["same: many", "5.00", moe, "3.00", "-"],
        ["same: edge", "1.00", moe, "0.67", "1.00"],
        ["same: one", "1.00", moe, "1.33", "2.00"],
    ]
    # What was timed in another way than its reference isn't held against it.
    assert table([dataclasses.replace(r, timed_in_turn=r.run.arm != "moe") for r in results]) == [
        few
    ]


def test_bounds_are_said_to_be_no_measurement(tmp_path):
    sweep = Sweep("topology", ("v5e:2x2", "v5e:4x4"), SMALL | {"train": {"batch_size": 1}})
    suite, file = suite_of(sweep), sweep_file(tmp_path, "it")
    file.parent.mkdir()
    figures = {
        arm: {"seconds": 1e-3 * s, "received_bytes": 1e6 * s}
        for arm, s in (("moe", 1), ("aoe", 2), ("dense", 4))
    }
    write_json(
        file,
        {
            "points": [
                point | {"figures": figures} for point in missing_points(suite, tmp_path, "it")
            ]
        },
    )
    comparison = Comparison(suite, [])
    blocks = throughput(
        comparison, {"it": read_costs(suite, tmp_path, "it")}, styles_of(comparison)
    )
    text = to_markdown(blocks, "figures")
    assert (
        "nothing is measured" in text
        and "bounds, not measured" in text
        and "0.50 / 2.00 | 0.25 / 4.00" in text
    )
    other = dataclasses.replace(suite, base=tiny.get_config("moe"))
    assert read_costs(other, tmp_path, "it")  # the same configurations
    changed = suite_of(dataclasses.replace(sweep, changes=SMALL))
    assert read_costs(changed, tmp_path, "it") == {}
    assert load_suite("configs/compare/throughput.py").throughput.keys() == {
        "experts",
        "chosen",
        "rank",
        "tokens",
        "chips",
    }
