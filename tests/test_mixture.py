"""Whole runs over two corpora: killed and resumed, on two processes, evaluated by source."""

import json
import shutil

import numpy as np
import pytest

from tests.processes import train_on
from tests.runs import (
    DENSE,
    EVERY,
    STEPS,
    mixture,
    read_metrics,
    run,
    same_end,
    saved,
    scratch,
    shared,
    start,
    tiny_config,
    train_command,
    untimed,
)
from tests.test_multiprocess import losses
from tests.test_train import kill_when, raw_checkpoint

pytestmark = pytest.mark.slow

FIGURES = ("nll", "bits_per_byte")


@shared
def mixed_run():
    """Workdir of an uninterrupted run."""
    workdir = scratch("mixture") / "whole"
    status, _, stderr = run(train_command(workdir, **mixture()))
    assert status == 0, stderr
    return workdir


def position(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "run" / "metadata").read_text())[
        "data"
    ]


def test_every_source_has_its_share():
    rows = STEPS * tiny_config().train.batch_size
    assert position(mixed_run(), STEPS) == {
        "next_index": STEPS,
        "sources": {"mine": rows * 3 // 4, "others": rows // 4},
    }
    lines, validations = read_metrics(mixed_run())
    assert lines[-1]["nll"] < lines[0]["nll"] - 1
    for line in validations:
        for name in FIGURES:
            low, high = sorted(line[f"validation_{name}/{source}"] for source in ("mine", "others"))
            assert low < line[f"validation_{name}"] < high
    summary = json.loads((mixed_run() / "summary.json").read_text())["metrics"]
    assert (
        summary.items()
        >= {
            name: value for name, value in untimed(mixed_run())[1][-1].items() if name != "step"
        }.items()
    )


def test_killed_run_ends_as_an_uninterrupted_one():
    whole, killed = mixed_run(), scratch("mixture") / "killed"
    command = train_command(killed, **mixture())
    kill_when(start(command), lambda: saved(killed, 2 * EVERY))
    status, _, stderr = run(command)
    assert status == 0 and "going on from step" in stderr, stderr
    (arrays, at), (killed_arrays, killed_at) = (
        raw_checkpoint(workdir, STEPS) for workdir in (whole, killed)
    )
    assert arrays.keys() == killed_arrays.keys() and at["data"] == killed_at["data"]
    for path, array in arrays.items():
        assert array.tobytes() == killed_arrays[path].tobytes(), path
    assert same_end(killed, whole)


def test_two_processes_train_as_one_does():
    one, two = (scratch("mixture") / name for name in ("one", "two"))
    settings = mixture() | DENSE | {"train__steps": 8}
    status, _, stderr = run(train_command(one, **settings))
    assert status == 0, stderr
    train_on(two, 2, n_devices=2, **settings)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert position(two, 8) == position(one, 8)


def test_evaluation_is_of_all_tokens_and_by_source(tmp_path):
    workdir = shutil.copytree(mixed_run(), tmp_path / "run")
    status, stdout, stderr = run(["eval.py", f"--workdir={workdir}", "--split=validation"])
    assert status == 0, stderr
    report = json.loads((workdir / "eval.json").read_text())
    validation = read_metrics(workdir)[1][-1]
    sources = report["sources"]
    assert list(sources) == ["mine", "others"]
    for name in FIGURES:
        np.testing.assert_allclose(report[name], validation[f"validation_{name}"], rtol=1e-6)
        for source, result in sources.items():
            np.testing.assert_allclose(
                result[name], validation[f"validation_{name}/{source}"], rtol=1e-6
            )
    assert report["tokens"] == sum(result["tokens"] for result in sources.values())
    summed = sum(result["nll"] * result["tokens"] for result in sources.values())
    np.testing.assert_allclose(report["nll"], summed / report["tokens"], rtol=1e-9)
    for source, result in sources.items():
        line = next(line for line in stdout.splitlines() if line.startswith(f"{source}: "))
        assert f"{result['tokens']} tokens" in line and f"{result['nll']:.4f}" in line
        assert f"{result['bits_per_byte']:.4f}" in line
