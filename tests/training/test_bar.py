"""The bar of a run: in a terminal alone, under the log, and gone at the end, however a run ends."""

import errno
import logging
import os
import re
import signal
import sys
from contextlib import closing

import numpy as np
import pytest

from aoe_jax.errors import Hang
from aoe_jax.training.bar import MAX_EXPERTS, Bar, load_columns
from aoe_jax.training.telemetry import Telemetry, layer_figures
from tests.runs import dense_command, finish, start, tiny_config
from tests.terminal import Terminal, shown
from tests.test_faults import heartbeat, patched, wait_for
from tests.test_hangs import without_data
from tests.training.test_telemetry import metrics_of

log = logging.getLogger("aoe_jax")


def attached(monkeypatch):
    """A terminal that is stderr from now on; pytest resets stderr after fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.file)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", log.level)
    log.setLevel(logging.INFO)  # loggers below it may have noted that they are off
    monkeypatch.setattr(log, "propagate", False)
    return terminal


def figures(bar, step, load):
    """Gives a bar the figures of a step in which every layer has these loads."""
    metrics = {"load": np.tile(load, (2, 1)), "mean_score": np.ones((2, len(load)))}
    layers = layer_figures(metrics | {"confidence_entropy": np.ones(2)})
    scalars = {"tokens_per_second": 12345.6, "load_entropy": layers["load_entropy"].mean()}
    bar.write(step, "train", scalars, layers, metrics)


def test_columns_show_loads():
    assert load_columns(np.array([0.0, 1.0, 1.0, 2.0, 1.0])) == "▁▅▅█▅"
    assert load_columns(np.array([0.5] * 3)) == "▅▅▅"
    assert load_columns(np.zeros(2)) == "▁▁"
    assert load_columns(np.array([100.0] + [0.1] * 20))[0] == "█"


def test_it_shows_the_run_below_the_log(monkeypatch):
    terminal = attached(monkeypatch)
    bar = Bar(3, 50)
    with closing(bar):
        bar.status("compiling")
        bar.status("training")
        bar.step(4, 5.4321)
        figures(bar, 5, np.array([0.25, 0.75, 0.5, 0.5]))
        log.info("a line of the log")
        bar.status("saving")
        bar.step(6, 4.5)
    log.info("another line")
    written = terminal.written()
    before = shown(written[: written.index("another line")])
    assert [line for line in before if line] == ["a line of the log"]
    assert shown(written)[-2:] == ["another line", ""]
    drawn = re.split(r"[\r\n]+", written)
    assert any(line.startswith("compiling  3/50") for line in drawn)
    load = r"load ▃▇▅▅ max 1.50x, entropy 95%"
    wanted = rf"saving     5/50  10%\|.*\| .* left, loss 5.4321, 12,346 tokens/s, {load}"
    assert any(re.fullmatch(wanted, line) and len(line) <= 120 for line in drawn), written


@pytest.mark.parametrize(("encoding", "n_experts"), [("ascii", 4), ("utf-8", MAX_EXPERTS + 1)])
def test_columns_are_left_out(monkeypatch, encoding, n_experts):
    """A terminal that has no such characters, and too many experts."""
    terminal = attached(monkeypatch)
    terminal.file.reconfigure(encoding=encoding)
    with closing(Bar(0, 10)) as bar:
        figures(bar, 1, np.full(n_experts, 0.5))
        bar.status("saving")
    written = terminal.written()
    assert "load max 1.00x, entropy 100%" in written
    assert not set("▁▂▃▄▅▆▇") & set(written)


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN])
def test_a_terminal_that_fails_ends_nothing(monkeypatch, code):
    terminal = attached(monkeypatch)
    write, failing = terminal.file.write, []

    def write_or_fail(text):
        if failing:
            raise OSError(code, os.strerror(code))
        return write(text)

    monkeypatch.setattr(terminal.file, "write", write_or_fail)
    with closing(Bar(0, 10)) as bar:
        bar.status("training")
        failing.append(True)
        bar.status("validating")
        bar.step(1, 5.0)
        failing.clear()
        bar.status("saving")
    assert "saving     1/10" in terminal.written()


def test_it_needs_a_terminal(capfd):
    with closing(Bar(0, 10)) as bar:
        bar.status("training")
        bar.step(1, 5.0)
    assert not bar.shows and capfd.readouterr() == ("", "")


def test_the_log_has_the_lines_of_steps_where_no_bar_is(monkeypatch, tmp_path):
    terminal = attached(monkeypatch)
    for shows in (True, False):
        with closing(Bar(0, 10, shows=shows)) as bar:
            telemetry = Telemetry(tmp_path, tiny_config(), 0, bar=bar)
            telemetry.train(1, metrics_of(1))
            bar.status("saving")
            telemetry.close()
        log.info("the first run has ended" if shows else "the second run has ended")
    with_bar, without = terminal.written().split("the first run has ended")
    assert "step 1/24 | loss" in without and "step 1/24 | loss" not in with_bar
    assert "load ▅▅▅▅ max 1.00x, entropy 100%" in with_bar


def lines_of_log(terminal):
    """The lines that a terminal shows at the end, all of which must be whole lines of the log."""
    written = terminal.written()
    assert "training   " in written and "loss" in written
    *lines, last = shown(written)
    assert last == ""
    assert not any("|" in line and "left" in line for line in lines), lines
    return [line for line in lines if line]


def test_a_run_that_is_asked_to_stop_leaves_a_clean_terminal(tmp_path):
    terminal = Terminal()
    process = start(dense_command(tmp_path, train__steps=100_000), stderr=terminal.file)
    wait_for(process, lambda: (heartbeat(tmp_path)["step"] or 0) > 5)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    lines = lines_of_log(terminal)
    assert lines[-1].startswith("preempted: saved at step")
    assert any("compiled the train step" in line for line in lines)


def test_a_run_that_hangs_leaves_a_clean_terminal(tmp_path):
    command = patched(without_data(tmp_path, 0), tmp_path / "run", train__hang_timeout=5)
    terminal = Terminal()
    process = start(command, stderr=terminal.file)
    assert finish(process)[0] == Hang.status
    last = lines_of_log(terminal)[-1]
    assert last.startswith("error: process 0 (training, after step 6) made no"), last
