import os
import signal

import pytest

from aoe_jax.compare.jobs import Job, Machine, read_machines, read_outcome
from aoe_jax.errors import UserError
from tests.runs import start, wait_for

CORES = sorted(os.sched_getaffinity(0))


def job(folder, name, program):
    return Job(name, ("-c", program), folder / name)


def test_a_job_that_fails_stops_no_other(tmp_path, monkeypatch):
    """Each runs on its core, with the environment of the command and the machine's defaults."""
    monkeypatch.setenv("GIVEN", "3")
    names = ("WORD", "GIVEN")
    programs = {
        "bad": "import sys; print('why', file=sys.stderr); sys.exit(4)",
        "killed": "import os; print('at work', flush=True); os.kill(os.getpid(), 9)",
        "good": f"import os; print(os.sched_getaffinity(0), *map(os.environ.get, {names}))",
    }
    jobs = [job(tmp_path, *item) for item in programs.items()]
    Machine("cpu", [CORES[0]], {"WORD": "default", "GIVEN": "0"}).run(jobs)
    outcomes = [read_outcome(tmp_path / name) for name in programs]
    assert outcomes == [
        {"status": 4, "last_line": "why"},
        {"status": -9, "last_line": "killed by signal 9, after: at work"},
        {"status": 0, "last_line": f"{{{CORES[0]}}} default 3"},
    ]


# A `print` in the handler fails where the signal comes before the other `print` returns.
SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(0)))
os.write(1, b'ready\\n')
time.sleep(600)
"""
PARENT = """
import pathlib, sys
from aoe_jax import cli
from aoe_jax.compare.jobs import Machine
from tests.compare.test_jobs import SLEEPER, job

folder = pathlib.Path(sys.argv.pop())

def main():
    jobs = [job(folder, "sleeper", SLEEPER), job(folder, "next", "print(1)")]
    Machine("cpu", [None], {}).run(jobs)

cli.run(main)
"""


def test_a_stopped_command_stops_its_jobs_and_waits_for_them(tmp_path):
    process = start(["-c", PARENT, str(tmp_path)])
    log = tmp_path / "sleeper.log"
    wait_for(process, lambda: log.exists() and "\nready\n" in log.read_text())
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "the work so far is saved; the same command goes on" in stderr
    assert log.read_text().endswith("saved\n")
    assert not (tmp_path / "next.log").exists()
    assert not (tmp_path / "sleeper.outcome.json").exists()  # it is unfinished, not failed


@pytest.mark.parametrize("content", ["{}", '{"machines": [7]}', '{"status": 0, "last_line": []}'])
def test_files_of_another_kind(tmp_path, content):
    for name, read in (("machine.json", read_machines), ("x.outcome.json", read_outcome)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name} cannot be read: .*; remove it"):
            read(tmp_path if read is read_machines else tmp_path / "x")
