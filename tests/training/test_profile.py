"""The flag `--profile`, and a trace of a real run."""

import gzip
import json
import re

import pytest

from aoe_jax.errors import UserError
from aoe_jax.training.profile import steps_to_trace, tracing
from tests.runs import KINDS, run, train_command

PARTS = ("attention", "score", "route", "schedule", "dispatch", "experts", "combine")
PARTS += ("balance", "loss")
MALFORMED = ("x", "", "5", "5:", ":5", "5:0", "0:3", "-1:2", "1:2:3", "1.5:2", f"5:{'9' * 5000}")


@pytest.mark.parametrize("text", [*MALFORMED, "7:5", "11:1"])
def test_values_that_are_refused(text):
    words = "must be STEP:N" if text in MALFORMED else "the run ends at step 10"
    with pytest.raises(UserError, match=f"^--profile={text}: {words}"):
        steps_to_trace(text, 10)


def test_run_that_goes_on_behind_its_window(caplog):
    """The command that continues a stopped run has the same `--profile` as before."""
    assert steps_to_trace("7:4", 10) == range(7, 11)
    assert tracing(max, steps_to_trace("6:3", 10), None, 7) is max
    assert "--profile: the run is past step 6; nothing is traced" in caplog.text


@pytest.mark.slow
def test_trace_of_a_run(tmp_path):
    """It has two of four steps; its program names the parts of a model, forward and backward."""
    workdir, kind = tmp_path / "run", KINDS["aoe, over all"]  # its scores have a gradient
    changes = {"train__steps": 4, "train__eval_every": 0, "checkpoint__every": 100, **kind}
    status, _, stderr = run([*train_command(workdir, **changes), "--profile=2:2"])
    assert status == 0, stderr
    assert "wrote a trace of steps 2 to 3" in stderr
    (shown,) = (workdir / "profile").rglob("*.trace.json.gz")  # a trace viewer reads it
    events = json.loads(gzip.decompress(shown.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert steps == ["2", "3"]
    # The only wait for input is the one before the second step.
    assert len([event for event in events if event.get("name") == "input"]) == 1
    assert any("hlo_op" in event.get("args", {}) for event in events)

    (file,) = (workdir / "profile").rglob("*.xplane.pb")  # it includes the program
    names = set(re.findall(rb"jit\(train_step\)/[ -~]*", file.read_bytes()))
    for part in PARTS:
        found = [name for name in names if re.search(rf"[/(]{part}[/)]".encode(), name)]
        assert any(b"transpose" not in name for name in found), part
        assert part in ("schedule", "route") or any(b"transpose" in name for name in found), part
    assert any(b"/update/" in name for name in names)
