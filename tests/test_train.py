"""Whole training runs: the files that they write, and that a killed run continues and ends like an
uninterrupted run.
"""

import json
import random
import shutil

import numpy as np
import pytest

from aoe_jax.model.counts import parameter_counts
from aoe_jax.training.metrics import MEASURED
from tests import runs
from tests.runs import EVERY, LOG_EVERY, STEPS, finished_run, read_metrics, succeed, train_command

LOGGED = [*range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
LINE = {"step", "loss", "nll", "aux_loss", "grad_norm", "update_norm", "param_norm"}
LINE |= {"learning_rate", "skipped"}
EXPERT_LINE = LINE | {"load_entropy", "load_spread", "confidence_entropy", "experts_per_token"}
EXPERT_LINE |= {"layers"}
SPEED = {"tokens_per_second", "tokens_per_second_per_device", "flops_per_second_per_device"}
SPEED |= {"goodput"}
SPLIT = {"input_seconds", "checkpoint_seconds", "compute_seconds"}
HOST = {"host_memory_bytes", "host_memory_peak_bytes"}
FILES = {"config.json", "data.json", "heartbeat.json", "tokenizer.json", "metrics.jsonl"}
FILES |= {"summary.json", "training.png", "tensorboard", "checkpoints"}


@pytest.mark.smoke
def test_what_a_run_leaves_behind():
    workdir, config = finished_run(), runs.tiny_config()
    assert {path.name for path in workdir.iterdir()} == FILES
    assert json.loads((workdir / "config.json").read_text()) == config.to_stored()
    checkpoints = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert checkpoints == {STEPS - EVERY, STEPS}
    (events,) = (workdir / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 1000

    lines, validations = read_metrics(workdir)
    assert [line["step"] for line in lines] == LOGGED
    assert all(line.keys() == EXPERT_LINE | SPEED | SPLIT | HOST for line in lines)
    assert all(len(values) == 2 for line in lines for values in line["layers"].values())
    assert [line["step"] for line in validations] == [10, 20, STEPS]
    assert lines[-1]["nll"] < lines[0]["nll"] - 1
    assert validations[-1]["validation_nll"] < validations[0]["validation_nll"]

    summary = json.loads((workdir / "summary.json").read_text())
    metrics, timing, memory = (summary[name] for name in ("metrics", "timing", "memory"))
    assert (metrics["step"], metrics["tokens"]) == (STEPS, STEPS * 4 * 32)
    assert (metrics["train_loss"], metrics["train_nll"]) == (lines[-1]["loss"], lines[-1]["nll"])
    for name in ("validation_nll", "validation_bits_per_byte"):
        assert metrics[name] == validations[-1][name]
    arrays, _ = runs.raw_checkpoint(workdir, STEPS)
    parameters = sum(array.size for path, array in arrays.items() if path.startswith("['params']"))
    assert summary["parameters"]["total"] == parameters == parameter_counts(config).total
    others = {"evaluation_seconds", "compile_seconds"}
    assert timing.keys() == SPEED | SPLIT | others | {"total_seconds"}
    parts = [timing[name] for name in SPLIT | others]
    assert all(seconds > 0 for seconds in parts) and sum(parts) < timing["total_seconds"]
    for name in SPLIT:  # each second is in exactly one line
        assert timing[name] == pytest.approx(sum(line[name] for line in lines), rel=1e-6)
    assert memory.keys() == HOST | {"state_bytes", "argument_bytes", "temporary_bytes"}
    assert memory["state_bytes"] == pytest.approx(3 * 4 * parameters, rel=0.02)


@pytest.mark.slow
def test_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """It is killed before its first step, so that the seed may still change. Later it is killed
    again after a checkpoint. Samples of text change nothing, and none is lost or written twice.
    """
    whole, killed = runs.whole_run(2), tmp_path / "run"
    command = train_command(killed, train__accumulate=2, train__sample_every=2)
    runs.kill_when(runs.start([*command, "--config.train.seed=1"]), (killed / "config.json").exists)
    assert not list((killed / "checkpoints").glob("[0-9]"))
    first = random.choice([1, 2, 3]) * EVERY
    runs.kill_when(runs.start(command), lambda: runs.saved(killed, first))
    assert not (killed / "summary.json").exists()
    assert "going on from step" in succeed(command)
    assert runs.same_end(killed, whole)

    arrays, killed_arrays = (runs.raw_checkpoint(workdir, STEPS)[0] for workdir in (whole, killed))
    assert arrays["['step']"] == STEPS
    assert {path.split("'")[1] for path in arrays} >= {"params", "opt_state"}
    as_bytes = [
        {path: (array.dtype, array.tobytes()) for path, array in of_run.items()}
        for of_run in (arrays, killed_arrays)
    ]
    one, other = as_bytes
    assert one.keys() == other.keys() and not [path for path in one if one[path] != other[path]]
    assert [line["step"] for line in runs.untimed(killed)[0]] == LOGGED

    samples = [*map(json.loads, (killed / "samples.jsonl").read_text().splitlines())]
    assert [sample["step"] for sample in samples] == [*range(2, STEPS + 1, 2)]
    charts = [
        {
            place: value.SerializeToString()
            for place, value in runs.read_events(workdir).items()
            if not place[0].endswith((*MEASURED, "text_summary"))
        }
        for workdir in (whole, killed)
    ]
    assert charts[0] == charts[1]
    last = runs.read_events(killed)["sample/text_summary", STEPS].tensor.string_val
    assert [text.decode() for text in last] == [samples[-1]["text"]]


@pytest.mark.parametrize("has_summary", [False, True])
def test_run_killed_between_its_last_checkpoint_and_its_last_status(tmp_path, has_summary):
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    if not has_summary:
        (workdir / "summary.json").unlink()
    heartbeat = workdir / "heartbeat.json"
    heartbeat.write_text(heartbeat.read_text().replace('"finished"', '"saving"'))
    stderr = succeed(train_command(workdir))
    assert f"going on from step {STEPS}" in stderr and "done: " in stderr
    assert runs.same_end(workdir, finished_run())
    assert runs.heartbeat(workdir)["status"] == "finished"


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """The texts may be in another folder, the cache may be another one, and layers may be unrolled.
    None of these changes the result.
    """
    workdir, steps = shutil.copytree(finished_run(), tmp_path / "run"), STEPS + LOG_EVERY + 1
    before = (workdir / "metrics.jsonl").read_text()
    texts = shutil.copytree(runs.corpus_folder(), tmp_path / "texts")
    moved = {"data__path": texts, "data__cache": tmp_path / "cache", "model__unroll": 2}
    succeed(train_command(workdir, train__steps=steps, checkpoint__every=100, **moved))
    assert (workdir / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in read_metrics(workdir)[0]] == [*LOGGED, steps - 1, steps]
    assert {("train/loss", STEPS), ("train/loss", steps)} <= runs.read_events(workdir).keys()
    assert json.loads((workdir / "summary.json").read_text())["metrics"]["step"] == steps
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == steps


@pytest.mark.slow
def test_a_branch_ends_as_a_run_with_its_number_of_steps(tmp_path):
    """A run with the schedule wsd has constant rates until 6 of 12 steps, a branch until 3 of 6."""
    wsd = {"train__schedule": "wsd", "train__warmup": 0.0, "train__decay": 0.5}
    wsd |= {"checkpoint__keep_every": EVERY}
    long, whole, branch = tmp_path / "long", tmp_path / "whole", tmp_path / "branch"
    succeed(runs.dense_command(long, train__steps=12, **wsd))
    succeed(runs.dense_command(whole, train__steps=6, **wsd))
    command = runs.dense_command(branch, train__steps=6, **wsd)
    for value, words in (
        ("3", "--branch=3: write it as DIR@STEP, such as"),
        (f"{long}@5", f"--branch={long}@5: {long} has checkpoints of steps 3, 6, 9, 12; give"),
        (f"{long}@6", "below config.train.steps=6"),
        (f"{long}@3 --start-over", "leave it out with --branch"),
        (f"{long}@3 --config.train.seed=7", f"workdir {long} holds another configuration: train"),
    ):
        status, _, stderr = runs.run([*command, *f"--branch={value}".split()])
        assert status == 2 and words in runs.last_line(stderr), stderr
        assert not (branch / "checkpoints").exists()
    assert "going on from step 3" in succeed([*command, f"--branch={long}@3"])
    assert runs.same_end(branch, whole)
    status, _, stderr = runs.run([*command, f"--branch={long}@9"])
    assert "has a run, which goes on; --branch has no effect" in stderr
    assert status == 2 and "is already at step 6" in runs.last_line(stderr)


@pytest.mark.parametrize("kind", ["router", "capacity", "dense"])
def test_other_kinds_train(kind):
    workdir, stderr = runs.kind_run(kind)
    balance = runs.kind_config(kind).balance
    lines, validations = read_metrics(workdir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    keys = {"dense": LINE, "capacity": EXPERT_LINE | {"dropped_share"}}.get(kind, EXPERT_LINE)
    assert all(runs.computed(line).keys() == keys for line in lines)
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.3
    for line in lines:
        loss = line["nll"] + balance.aux_weight * line["aux_loss"]
        np.testing.assert_allclose(line["loss"], loss, rtol=1e-6)
        if kind != "dense":
            np.testing.assert_allclose(line["experts_per_token"], 2, rtol=1e-6)
        if kind == "capacity":
            by_layer = line["layers"]["dropped_share"]
            assert len(by_layer) == 2 and 0 < line["dropped_share"] < 0.9
            np.testing.assert_allclose(line["dropped_share"], np.mean(by_layer), rtol=1e-6)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["metrics"]["validation_nll"] == validations[-1]["validation_nll"]
    assert ("is not causal" in stderr) == (kind == "capacity")
