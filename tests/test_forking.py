"""Forked commands end as started ones do, and leave nothing behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forking import ROOT
from tests.hasty import xla_flags
from tests.runs import finish, start

COMMANDS = {
    "exit status": ["-c", "import sys; print(sys.argv); sys.exit(3)", "--flag"],
    "exit message": ["-c", "import sys; sys.exit('message')"],
    "exception": ["-c", "print('before'); 1 / 0"],
    "signal": ["-c", "import os; print('before', flush=True); os.kill(os.getpid(), 9)"],
    "interrupt": ["-c", "raise KeyboardInterrupt"],
    "exit handler": ["-c", "import atexit; atexit.register(print, 'at exit'); print(__name__)"],
    "devices": ["-c", "import jax; print(jax.devices(), jax.numpy.ones(2) + 1)"],
    "module": ["-m", "aoe_jax.export", "--workdir=/nowhere"],
    "script": ["train.py", "--config=configs/nowhere.py"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_forked_command_ends_as_a_started_one(name):
    forked, started = (
        finish(start(COMMANDS[name], forked=forked, XLA_FLAGS=xla_flags(3)))
        for forked in (True, False)
    )
    assert forked[:2] == started[:2]
    assert forked[2].splitlines()[-1:] == started[2].splitlines()[-1:]


def test_signals():
    process = start(["-c", "import time; time.sleep(60)"])
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "") and process.poll() == -signal.SIGTERM


def test_a_session_leaves_nothing_behind():
    """Neither a process nor a warning."""
    sleeps = ["-c", "import time; time.sleep(60)"]
    session = f"from tests import forking; print(forking.start({sleeps}).pid)"
    command = [sys.executable, "-c", session]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
