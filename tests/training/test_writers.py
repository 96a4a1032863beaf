"""metrics.jsonl and TensorBoard files, read back without the writer; Weights & Biases offline."""

import importlib
import json
import logging
import re
import shutil
import sys

import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.metrics import Metrics
from aoe_jax.training.writers import Bar, JsonLines, TensorBoard, Wandb, check_wandb
from tests.runs import (
    finish,
    finished_run,
    read_events,
    read_metrics,
    start,
    tiny_config,
    train_command,
)
from tests.terminal import Terminal, shown

LAYERS = {"load_entropy": np.array([1 / 3, 2 / 3], np.float32), "dead_experts": np.array([0, 2])}


def test_lines_after_the_checkpoint_are_dropped(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    for step in (2, 4):
        writer.write(step, "train", {"loss": step}, {}, {})
    size = writer.sync()
    writer.write(6, "train", {"loss": 6}, {}, {})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the half line of a killed run
    kept = path.read_text().splitlines()[:2]
    with caplog.at_level("INFO"):
        writer = JsonLines(path, size)
    assert "metrics.jsonl: dropped 1 lines of steps after the checkpoint" in caplog.text
    assert path.read_text().splitlines() == kept
    writer.write(6, "train", {"loss": 60}, {}, {})
    writer.close()
    assert path.read_text().splitlines() == [*kept, '{"step": 6, "loss": 60}']


@pytest.mark.parametrize(
    "change", [lambda text: "", lambda text: text[3:], lambda text: text + "x"]
)
def test_lines_that_are_lost(tmp_path, change):
    """A file that is shorter than at the checkpoint, or in which it ends within a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.5}\n')
    size = path.stat().st_size + (change("a") == "ax")
    path.write_text(change(path.read_text()))
    before = path.read_text()
    with pytest.raises(UserError, match=r"metrics.jsonl has lost lines: .* or --start-over begins"):
        JsonLines(path, size)
    assert path.read_text() == before


def test_a_write_that_is_short_loses_nothing(tmp_path, monkeypatch):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, "train", {"loss": 1}, {}, {})
    file = writer._file

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, content):
            return file.write(content[:5])

    writer._file = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.write(2, "train", {"loss": 2}, {}, {})
    writer._file = file
    writer.write(3, "train", {"loss": 3}, {}, {})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def attached(monkeypatch):
    """A terminal that is stderr from now on; pytest resets stderr after fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.file)
    handler = logging.StreamHandler(terminal.file)
    log = logging.getLogger("aoe_jax")
    monkeypatch.setattr(log, "handlers", [handler])
    log.setLevel(logging.INFO)
    return terminal


def test_the_bar_is_below_the_log_and_gone_at_the_end(monkeypatch):
    terminal = attached(monkeypatch)
    bar = Bar(3, 50)
    layers = {"load_max_over_mean": np.array([1.0, 2.0])}
    bar.write(5, "train", {"loss": 5.4321, "tokens_per_second": 12345.6}, layers, {})
    bar.step(5)
    logging.getLogger("aoe_jax").info("a line of the log")
    bar._bar.refresh()
    bar.close()
    written = terminal.written()
    assert [line for line in shown(written) if line] == ["a line of the log"]
    assert re.search(r"5/50 .*loss=5.4321, tokens/s=12,346, load max=1.50x", written), written


def test_lines_are_on_disk_at_once(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, "train", {"loss": 0.1}, LAYERS, {})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {
        **{"step": 1, "loss": 0.1},
        "layers": {"load_entropy": [0.33333334, 0.6666667], "dead_experts": [0, 2]},
    }
    writer.close()


def test_numbers_keep_their_precision(tmp_path):
    values = np.random.default_rng(0).lognormal(0, 20, 500).astype(np.float32)
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, "train", {"nll": float(values[0])}, {"norm": values}, {})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert np.float32(line["nll"]) == values[0]
    np.testing.assert_array_equal(np.array(line["layers"]["norm"], np.float32), values)


def test_charts(tmp_path):
    writer = TensorBoard(tmp_path / "tensorboard", 0)
    writer.write(
        3, "train", {"loss": 2.5}, LAYERS, {"load": np.array([[0, 1, 1, 2], [1, 1, 1, 1.0]])}
    )
    writer.write(3, "validation", {"validation_nll": 3.5}, {}, {})
    writer.close()
    found = read_events(tmp_path)
    scalars = {
        tag: value.simple_value
        for (tag, _), value in found.items()
        if value.HasField("simple_value")
    }
    assert scalars == pytest.approx(
        {
            "train/loss": 2.5,
            "validation/nll": 3.5,
            "experts/load_entropy/layer_0": 1 / 3,
            "experts/load_entropy/layer_1": 2 / 3,
            "experts/dead_experts/layer_0": 0,
            "experts/dead_experts/layer_1": 2,
        }
    )
    histograms = [found[f"histograms/load/layer_{layer}", 3].histo for layer in (0, 1)]
    assert [(h.min, h.max, h.num, h.sum) for h in histograms] == [(0, 2, 4, 4), (1, 1, 4, 4)]


def test_wandb_is_asked_for(tmp_path, monkeypatch):
    assert "wandb" not in sys.modules  # whatever this process has done so far
    with pytest.raises(UserError, match="name a project"):
        check_wandb(tmp_path, "")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        UserError,
        match=r"--wandb=mine: the package wandb is missing; pip install 'aoe_jax\[wandb\]'",
    ):
        check_wandb(tmp_path, "mine")
    (tmp_path / "wandb.json").write_text('{"project": "mine", "id": "0"}')
    with pytest.raises(UserError, match="--wandb=other: the run in .* belongs to project mine"):
        check_wandb(tmp_path, "other")


@pytest.fixture
def wandb():
    """The module, which is not left behind: see `test_wandb_is_asked_for`."""
    yield importlib.import_module("wandb")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_wandb_that_cannot_be_reached(tmp_path, monkeypatch, caplog, wandb):
    """A run goes on without it, but a mistake of the user is said."""

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


def test_wandb_offline(tmp_path):
    """A run that continues is the same run there, and has the figures of metrics.jsonl."""
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    logged = len(read_metrics(workdir)[0])
    for steps in (26, 28):
        command = [*train_command(workdir, train__steps=steps, train__eval_every=0), "--wandb=mine"]
        status, stdout, stderr = finish(start(command, WANDB_MODE="offline"))
        assert status == 0, stderr
        assert stdout.startswith("result ") and len(stdout.splitlines()) == 6
    assert [line["step"] for line in read_metrics(workdir)[0][logged:]] == [26, 28]
    identity = json.loads((workdir / "wandb.json").read_text())
    assert identity["project"] == "mine"
    files = sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity['id']}.wandb"] * 2
    for file, line in zip(files, read_metrics(workdir)[0][logged:], strict=True):
        sent = file.read_bytes()
        for name, value in {"step": line["step"], "train/loss": line["loss"]}.items():
            assert re.search(
                rf"{name}.{{1,8}}{re.escape(json.dumps(value))}".encode(), sent, re.DOTALL
            ), name
        assert b"experts/load_entropy/layer_1" in sent and b"validation/nll" in sent
