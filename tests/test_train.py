"""Whole training runs: what they leave behind, and that a killed one ends as if it had not been
killed.
"""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from aoe_jax.model.counts import parameter_counts
from aoe_jax.training.metrics import MEASURED
from tests.runs import (
    EVERY,
    KINDS,
    LOG_EVERY,
    STEPS,
    corpus_folder,
    finish,
    finished_run,
    kind_config,
    kind_run,
    read_events,
    read_metrics,
    run,
    same_end,
    saved,
    start,
    tiny_config,
    train_command,
    whole_run,
)

LOGGED = list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
LINE = {
    "step",
    "loss",
    "nll",
    "aux_loss",
    "grad_norm",
    "update_norm",
    "param_norm",
    "learning_rate",
    "skipped",
}
EXPERT_LINE = LINE | {
    "load_entropy",
    "load_spread",
    "confidence_entropy",
    "experts_per_token",
    "layers",
}
SPEED = {
    "goodput",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "flops_per_second_per_device",
}
SPLIT = {"input_seconds", "checkpoint_seconds", "compute_seconds"}
HOST = {"host_memory_bytes", "host_memory_peak_bytes"}


def computed(line):
    """What two runs of the same steps have in common."""
    return {key: value for key, value in line.items() if not key.endswith(MEASURED)}


def raw_checkpoint(workdir, step):
    """Every array of a checkpoint by its path, without the library's own code; and what is saved
    beside them.
    """
    folder = workdir / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(
            folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
    arrays = {
        jax.tree_util.keystr(path): array
        for path, array in jax.tree_util.tree_leaves_with_path(state)
    }
    return arrays, json.loads((folder / "run" / "metadata").read_text())


@pytest.mark.smoke
def test_what_a_run_leaves_behind():
    workdir = finished_run()
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "data.json",
        "heartbeat.json",
        "tokenizer.json",
        "metrics.jsonl",
        "summary.json",
        "training.png",
        "tensorboard",
        "checkpoints",
    }
    assert json.loads((workdir / "config.json").read_text()) == tiny_config().to_dict()
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [
        STEPS - EVERY,
        STEPS,
    ]
    (events,) = (workdir / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 1000

    lines, validations = read_metrics(workdir)
    assert [line["step"] for line in lines] == LOGGED
    assert all(line.keys() == EXPERT_LINE | SPEED | SPLIT | HOST for line in lines)
    assert all(len(values) == 2 for line in lines for values in line["layers"].values())
    assert [line["step"] for line in validations] == [10, 20, STEPS]
    pictures = [
        step for (tag, step), value in read_events(workdir).items() if value.HasField("image")
    ]
    assert pictures == [10, 20, STEPS]

    summary = json.loads((workdir / "summary.json").read_text())
    metrics = summary["metrics"]
    assert (metrics["step"], metrics["tokens"]) == (STEPS, STEPS * 4 * 32)
    assert (metrics["train_loss"], metrics["train_nll"]) == (lines[-1]["loss"], lines[-1]["nll"])
    assert metrics["validation_nll"] == validations[-1]["validation_nll"]
    assert metrics["validation_bits_per_byte"] == validations[-1]["validation_bits_per_byte"]
    arrays, _ = raw_checkpoint(workdir, STEPS)
    parameters = sum(array.size for path, array in arrays.items() if path.startswith("['params']"))
    assert summary["parameters"]["total"] == parameters
    timing, memory = summary["timing"], summary["memory"]
    assert timing.keys() == SPEED | SPLIT | {
        "evaluation_seconds",
        "compile_seconds",
        "total_seconds",
    }
    parts = [timing[name] for name in (*SPLIT, "evaluation_seconds", "compile_seconds")]
    assert all(seconds > 0 for seconds in parts) and sum(parts) < timing["total_seconds"]
    for name in SPLIT:  # nothing of it falls between two lines
        assert timing[name] == pytest.approx(sum(line[name] for line in lines), rel=1e-6)
    assert memory.keys() == HOST | {"state_bytes", "argument_bytes", "temporary_bytes"}
    assert memory["state_bytes"] == pytest.approx(
        3 * 4 * parameter_counts(tiny_config()).total, rel=0.02
    )


def test_loss_goes_down():
    lines, validations = read_metrics(finished_run())
    assert lines[-1]["nll"] < lines[0]["nll"] - 1
    assert validations[-1]["validation_nll"] < validations[0]["validation_nll"]


def test_accumulation_changes_only_rounding():
    (one, one_validation), (two, two_validation) = (
        read_metrics(whole_run(accumulate)) for accumulate in (1, 2)
    )
    np.testing.assert_allclose(
        [line["nll"] for line in one[:4]], [line["nll"] for line in two[:4]], rtol=1e-5
    )
    np.testing.assert_allclose(
        [line["nll"] for line in one], [line["nll"] for line in two], rtol=1e-3
    )
    np.testing.assert_allclose(
        one_validation[-1]["validation_nll"], two_validation[-1]["validation_nll"], rtol=1e-3
    )


def kill_when(process, condition):
    """Kills a process once `condition()` holds; fails if it ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


def test_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """It is killed before its first step, and so may get another seed, and again after a
    checkpoint.
    """
    whole, killed = whole_run(2), tmp_path / "run"
    command = train_command(killed, train__accumulate=2)
    other = train_command(killed, train__accumulate=2, train__seed=1)
    kill_when(start(other), (killed / "config.json").exists)
    assert not list((killed / "checkpoints").glob("[0-9]"))
    first = random.choice([1, 2, 3]) * EVERY
    kill_when(start(command), lambda: saved(killed, first))
    assert not (killed / "summary.json").exists()
    status, _, stderr = run(command)
    assert status == 0, stderr
    assert "going on from step" in stderr
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (whole, killed)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]

    (arrays, beside), (killed_arrays, killed_beside) = (
        raw_checkpoint(w, STEPS) for w in (whole, killed)
    )
    assert arrays.keys() == killed_arrays.keys()
    assert any("opt_state" in path for path in arrays) and any("params" in path for path in arrays)
    assert arrays["['step']"] == STEPS
    for path, array in arrays.items():
        assert (
            array.dtype == killed_arrays[path].dtype
            and array.tobytes() == killed_arrays[path].tobytes()
        ), path
    assert beside["data"] and beside["data"] == killed_beside["data"]
    assert beside["arrays"] == killed_beside["arrays"]

    (lines, validations), (killed_lines, killed_validations) = (
        read_metrics(whole),
        read_metrics(killed),
    )
    assert [line["step"] for line in killed_lines] == LOGGED
    for line, killed_line in zip(lines, killed_lines, strict=True):
        assert computed(line) == computed(killed_line)
    assert [computed(line) for line in validations] == [
        computed(line) for line in killed_validations
    ]

    events, killed_events = charts(whole), charts(killed)
    assert events.keys() == killed_events.keys()
    assert {place: value for place, value in events.items() if killed_events[place] != value} == {}


def charts(workdir):
    """What TensorBoard shows of a run, without what is measured."""
    return {
        (tag, step): value.SerializeToString()
        for (tag, step), value in read_events(workdir).items()
        if not tag.endswith(MEASURED)
    }


def test_run_killed_between_its_last_checkpoint_and_its_summary(tmp_path):
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    (workdir / "summary.json").unlink()
    status, _, stderr = run(train_command(workdir))
    assert status == 0 and f"going on from step {STEPS}" in stderr and "done: " in stderr, stderr
    assert same_end(workdir, finished_run())
    assert run(train_command(workdir))[0] == 2


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """Its texts may have moved, the cache may be another, and layers may be unrolled: none of these
    changes the result.
    """
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    moved = {
        "model__unroll": 2,
        "data__path": str(shutil.copytree(corpus_folder(), tmp_path / "texts")),
        "data__cache": str(tmp_path / "cache"),
    }
    status, _, stderr = run(
        train_command(workdir, train__steps=STEPS + 4, checkpoint__every=100, **moved)
    )
    assert status == 0, stderr
    assert (workdir / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in read_metrics(workdir)[0]] == [*LOGGED, STEPS + 2, STEPS + 4]
    assert json.loads((workdir / "summary.json").read_text())["metrics"]["step"] == STEPS + 4
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == STEPS + 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind):
    workdir, stderr = kind_run(kind)
    config = kind_config(kind)
    lines, validations = read_metrics(workdir)
    assert [line["step"] for line in lines] == [2, 4, 6]
    keys = {"dense": LINE, "capacity": EXPERT_LINE | {"dropped_share"}}.get(kind, EXPERT_LINE)
    assert all(computed(line).keys() == keys for line in lines)
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.3
    for line in lines:
        aux, entropy = line["aux_loss"], line.get("confidence_entropy", 0)
        expected = (
            line["nll"] + config.balance.aux_weight * aux + config.balance.entropy_weight * entropy
        )
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-6)
    # Expert choice: capacity factor 2.
    if kind in (
        "aoe, over all",
        "router",
        "capacity",
        "expert_choice",
    ):
        np.testing.assert_allclose([line["experts_per_token"] for line in lines], 2, rtol=1e-6)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["metrics"]["validation_nll"] == validations[-1]["validation_nll"]
    assert ("expert_choice is not causal" in stderr) == (kind == "expert_choice")
    assert ("capacity is not causal" in stderr) == (kind == "capacity")


def test_dropped_choices_are_logged():
    """The mean over layers on each line, and each layer's there and in TensorBoard."""
    workdir, _ = kind_run("capacity")
    events = read_events(workdir)
    for line in read_metrics(workdir)[0]:
        by_layer = line["layers"]["dropped_share"]
        assert len(by_layer) == 2 and 0 < line["dropped_share"] < 0.9
        np.testing.assert_allclose(line["dropped_share"], np.mean(by_layer), rtol=1e-6)
        assert events["train/dropped_share", line["step"]].simple_value == pytest.approx(
            line["dropped_share"]
        )
