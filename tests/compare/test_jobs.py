import os
import signal
import subprocess
import sys
import time

import pytest

from aoe_jax.compare.jobs import Job, Machine, Slot, read_machines, read_outcome, slots_of
from aoe_jax.errors import UserError
from aoe_jax.storage.files import read_json
from tests.runs import ROOT

CORES = sorted(os.sched_getaffinity(0))


def job(folder, name, program):
    return Job(
        name,
        (sys.executable, "-c", program),
        folder / name,
        1.0,
        lambda: float((folder / f"{name}.outcome.json").exists()),
    )


def test_a_job_that_fails_stops_no_other(tmp_path):
    says_core = "import os; print(os.sched_getaffinity(0), os.environ['WORD'])"
    jobs = [
        job(tmp_path, "bad", "import sys; print('why', file=sys.stderr); sys.exit(4)"),
        job(tmp_path, "killed", "import os; print('at work', flush=True); os.kill(os.getpid(), 9)"),
        job(tmp_path, "good", says_core),
    ]
    Machine("cpu", [Slot(CORES[0])], {"WORD": "default"}).run(jobs)
    assert read_json(tmp_path / "bad.outcome.json") == {"status": 4, "last_line": "why"}
    killed = {"status": -9, "last_line": "killed by signal 9, after: at work"}
    assert read_json(tmp_path / "killed.outcome.json") == killed
    assert read_json(tmp_path / "good.outcome.json") == {
        "status": 0,
        "last_line": f"{{{CORES[0]}}} default",
    }


# A `print` in the handler fails where the signal comes before the other `print` returns.
SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(0)))
os.write(1, b'ready\\n')
time.sleep(600)
"""
PARENT = """
import os, pathlib
from aoe_jax import cli
from aoe_jax.compare.jobs import Machine, Slot
from tests.compare.test_jobs import SLEEPER, job

def main():
    folder = pathlib.Path(os.environ["FOLDER"])
    jobs = [job(folder, "sleeper", SLEEPER), job(folder, "next", "print(1)")]
    Machine("cpu", [Slot()], {}).run(jobs)

cli.run(main)
"""


def wait_for(line, log):
    deadline = time.monotonic() + 60
    while not log.exists() or f"\n{line}\n" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_what_is_at_work_ends_with_the_command(tmp_path, number, status):
    """Asked to stop, it asks its jobs and waits for them."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        env=os.environ | {"FOLDER": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "sleeper.log"
    wait_for("ready", log)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert "what is done is saved; the same command goes on" in stderr
    assert log.read_text().endswith("saved\n")
    assert not (tmp_path / "next.log").exists()
    assert not (tmp_path / "sleeper.outcome.json").exists()  # it is unfinished, not failed


def test_gpus_are_shared_out(monkeypatch):
    machine = {"backend": "gpu", "devices": 4}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_of(machine, None) == [Slot()]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(machine, 2)] == [
        "0,1",
        "2,3",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_of(machine, 2)] == ["5", "7"]
    with pytest.raises(UserError, match="--jobs=4: must divide the 2 GPUs"):
        slots_of(machine, 4)
    with pytest.raises(UserError, match="--jobs=2: on tpu a run takes all devices"):
        slots_of({"backend": "tpu", "devices": 4}, 2)


def test_a_slot_says_which_device(tmp_path):
    """Whatever the environment of the command says."""
    slot = Slot(environment={"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "3"})
    program = "import os; print(os.environ['PATH'], os.environ['CUDA_VISIBLE_DEVICES'])"
    Machine("gpu", [slot], {}).run([job(tmp_path, "one", program)])
    assert read_json(tmp_path / "one.outcome.json") == {"status": 0, "last_line": "/nowhere 3"}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("machine.json", lambda folder: read_machines(folder)),
        ("run.outcome.json", lambda folder: read_outcome(folder / "run")),
    ],
)
@pytest.mark.parametrize("content", ["{}", '{"machines": [7]}', '{"status": 0, "last_line": []}'])
def test_files_of_another_kind(tmp_path, name, read, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} cannot be read: .*; remove it"):
        read(tmp_path)
