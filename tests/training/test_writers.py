"""Reads metrics.jsonl and TensorBoard files without our writers; tests Weights & Biases offline."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.metrics import Metrics
from aoe_jax.training.wandb_writer import Wandb
from aoe_jax.training.writers import JsonLines
from tests.in_process import execute
from tests.runs import finish, finished_run, read_metrics, start, tiny_config, train_command

LAYERS = {"load_entropy": np.array([1 / 3, 2 / 3], np.float32), "dead_experts": np.array([0, 2])}


def test_lines_after_the_checkpoint_are_dropped(tmp_path, caplog, monkeypatch):
    path, synced = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr("aoe_jax.training.writers.os.fsync", synced.append)
    writer = JsonLines(path, 0)
    for step in (2, 4):
        writer.write(step, "train", {"loss": step}, {}, {})
    size = writer.sync()
    assert synced == [writer._file.fileno()]
    writer.write(6, "train", {"loss": 6}, {}, {})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # an incomplete line of a killed run
    kept = path.read_text().splitlines()[:2]
    with caplog.at_level("INFO"):
        writer = JsonLines(path, size)
    assert "metrics.jsonl: dropped 1 lines of steps after the checkpoint" in caplog.text
    assert path.read_text().splitlines() == kept
    writer.write(6, "train", {"loss": 60}, {}, {})
    writer.close()
    assert path.read_text().splitlines() == [*kept, '{"step": 6, "loss": 60}']


@pytest.mark.parametrize(("kept", "size"), [("", 12), ('tep": 2}\n', 12), ('{"step": 2}\nx', 13)])
def test_lines_that_are_lost(tmp_path, kept, size):
    """The file is shorter than at the checkpoint, or the checkpoint's size is within a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(kept)
    with pytest.raises(UserError, match=r"metrics.jsonl has lost lines: .* or --start-over begins"):
        JsonLines(path, size)
    assert path.read_text() == kept


def test_a_write_that_is_short_loses_nothing(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, "train", {"loss": 1}, {}, {})
    file = writer._file
    writer._file = SimpleNamespace(write=lambda content: file.write(content[:5]))
    with pytest.raises(OSError, match="No space left"):
        writer.write(2, "train", {"loss": 2}, {}, {})
    short, writer._file = writer._file, file
    writer.write(3, "train", {"loss": 3}, {}, {})
    writer._file = short
    writer._file.truncate = file.truncate
    with pytest.raises(OSError, match="No space left"):
        writer.write(4, "train", {"loss": 4}, {}, {})
    writer._file = file
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def replaced(path):
    """As an editor or `sed -i` does: a new file, made from the lines that were there before."""
    path.with_name("new").write_text("edited\n")
    path.with_name("new").replace(path)


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda path: path.resolve().unlink(), []),
        (lambda path: path.resolve().rename(path.with_name("metrics.jsonl.1")), []),  # logrotate
        (lambda path: replaced(path.resolve()), ["edited\n"]),
        (lambda path: (path.resolve().unlink(), path.resolve().mkdir()), ["a folder"]),
    ],
    ids=["removed", "rotated", "replaced", "replaced by a folder"],
)
def test_a_file_that_another_program_changes(tmp_path, caplog, change, kept, through_link):
    """No line is lost, and a link to a file on another disk stays a link."""
    path = tmp_path / "metrics.jsonl"
    if through_link:
        (tmp_path / "disk").mkdir()
        path.symlink_to(tmp_path / "disk" / "lines")
    writer = JsonLines(path, 0)
    for step in range(1, 4):
        writer.write(step, "train", {}, {}, {})
        if step == 1:
            change(path)
        if step == 2:
            assert writer.sync() == path.stat().st_size == 2 * len('{"step": 1}\n')
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert path.is_symlink() == through_link and "was removed or replaced" in caplog.text
    aside = tmp_path.glob("metrics.jsonl.replaced*")
    assert ["a folder" if file.is_dir() else file.read_text() for file in aside] == kept


@pytest.mark.parametrize("left", ["", '{"step": 1}', "x\n"])
def test_a_file_that_is_edited_in_place(tmp_path, caplog, left):
    """The run goes on with the shorter file, and the next start accepts it."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    writer.write(1, "train", {}, {}, {})
    path.write_text(left)  # as `logrotate` does with copytruncate
    size = writer.sync()
    assert "was edited: it had 12 bytes, now" in caplog.text
    writer.write(2, "train", {}, {}, {})
    writer.close()
    assert path.read_text().splitlines() == [*left.splitlines(), '{"step": 2}']
    JsonLines(path, size).close()


def test_a_file_that_cannot_be_restored(tmp_path, caplog):
    """The checkpoint is saved nevertheless, and a later save writes the lines."""
    (tmp_path / "disk").mkdir()
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(tmp_path / "disk" / "lines")
    writer = JsonLines(path, 0)
    writer.write(1, "train", {}, {}, {})
    (tmp_path / "disk").rename(tmp_path / "away")
    (tmp_path / "disk").touch()
    assert writer.sync() == 12 and "and cannot be written again (" in caplog.text
    (tmp_path / "disk").unlink()
    assert writer.sync() == 12 and path.read_text() == '{"step": 1}\n'
    writer.close()


def test_numbers_keep_their_precision(tmp_path):
    """A line can be read immediately after it is written."""
    values = np.random.default_rng(0).lognormal(0, 20, 500).astype(np.float32)
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, "train", {"nll": float(values[0])}, LAYERS | {"norm": values}, {})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    writer.close()
    assert line["step"] == 1 and np.float32(line["nll"]) == values[0]
    assert line["layers"]["load_entropy"] == [0.33333334, 0.6666667]
    assert line["layers"]["dead_experts"] == [0, 2]
    np.testing.assert_array_equal(np.array(line["layers"]["norm"], np.float32), values)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, stderr = execute([*train_command(tmp_path / "run"), "--wandb=mine"])
    assert status == 2
    assert stderr == "error: the package wandb is missing; pip install '.[wandb]'\n"
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_be_reached(tmp_path, monkeypatch, caplog):
    """A run continues without Weights & Biases, but a mistake of the user is an error."""
    import wandb  # slow

    def refuse(**_):
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    error = wandb.errors.CommError("timed out")
    metrics = Metrics(tmp_path, tiny_config(), 0, Progress(), 0.0)
    metrics.open(lambda: None, wandb="mine")
    metrics.close()
    assert "Weights & Biases cannot be reached (timed out); the run goes on" in caplog.text
    for error in (wandb.errors.UsageError("key?"), wandb.errors.CommError("returned error 403")):
        with pytest.raises(UserError, match=rf"--wandb=mine: {re.escape(str(error))}; log in"):
            Wandb(tmp_path, "mine", {})


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    """A continued run is the same run in Weights & Biases, with the numbers of metrics.jsonl."""
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    logged = len(read_metrics(workdir)[0])
    for steps in (26, 28):
        changes = {"train__eval_every": 0, "train__sample_every": 2}
        command = [*train_command(workdir, train__steps=steps, **changes), "--wandb=mine"]
        status, stdout, stderr = finish(start(command, WANDB_MODE="offline"))
        assert status == 0, stderr
        assert stdout.startswith("result ") and len(stdout.splitlines()) == 5
    added = read_metrics(workdir)[0][logged:]
    assert [line["step"] for line in added] == [26, 28]
    identity = json.loads((workdir / "wandb.json").read_text())["id"]
    files = sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    for file, line in zip(files, added, strict=True):
        sent = file.read_bytes()
        for name, value in {"step": line["step"], "train/loss": line["loss"]}.items():
            pattern = rf"{name}.{{1,8}}{re.escape(json.dumps(value))}"
            assert re.search(pattern.encode(), sent, re.DOTALL), name
        assert b"experts/load_entropy/layer_1" in sent and b"validation/nll" in sent
        (shown,) = file.parent.glob("files/media/html/sample_*.html")
        assert "<pre>" in shown.read_text()
