"""Starts a training command again until it has finished:
`python -m aoe_jax.supervise [--restarts=5] -- train.py --config=FILE --workdir=DIR ...`.

It restarts after a preemption of the command, a hang, a lost process, a fault of the machine and
anything unforeseen; not after a mistake of the user (exit status 2), divergence (4) or Ctrl-C. It
gives up after `--restarts` attempts in a row in which no step was added. Signals are passed on;
after SIGTERM or SIGINT the command is not started again. `WORKDIR/attempts/HOST.jsonl` has a line
for every attempt. The exit status is that of the last attempt.
"""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import DivergedError, Interrupted, UserError

log = logging.getLogger("aoe_jax.supervise")  # not __name__, which is __main__

_RESTARTS = flags.DEFINE_integer(
    "restarts", 5, "attempts in a row without a new step before it gives up", lower_bound=0
)
_PAUSE = flags.DEFINE_float(
    "pause", 5.0, "seconds before the first restart, doubled for each attempt without a new step"
)
_LONGEST_PAUSE = 300.0  # seconds
_FINAL = {UserError.status, DivergedError.status, Interrupted.status}
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """Runs a command again and again, and passes signals on to it."""

    def __init__(self, command: list[str], workdir: Path):
        """`command` are arguments of Python, and `workdir` is the directory of their run."""
        self._command, self._workdir = [sys.executable, *command], workdir
        self._process, self._asked_to_stop = None, threading.Event()
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number, frame):
        if number in (signal.SIGTERM, signal.SIGINT):
            self._asked_to_stop.set()
        if self._process:
            self._process.send_signal(number)  # does nothing to a process that has ended

    def run(self, restarts: int, pause: float) -> int:
        """Returns the exit status of the last attempt."""
        attempt = idle = 0
        while True:
            attempt += 1
            status, steps = self._attempt(attempt)
            idle = 0 if steps else idle + 1
            if self._is_over(status) or self._asked_to_stop.is_set():
                return status
            if idle > restarts:
                log.error(f"gave up: {idle} attempts in a row added no step")
                return status
            seconds = min(pause * 2 ** max(idle - 1, 0), _LONGEST_PAUSE)
            log.warning(f"attempt {attempt} ended with status {status}; next in {seconds:g} s")
            if self._asked_to_stop.wait(seconds):
                return status

    def _attempt(self, number):
        """Runs the command once; returns its exit status and the number of steps it added."""
        first_step, began = self._heartbeat().get("saved") or 0, time.time()
        # A Ctrl-C in the terminal must reach it once, through this process.
        self._process = subprocess.Popen(self._command, start_new_session=True)
        if self._asked_to_stop.is_set():  # it came while the process was made
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        heartbeat = self._heartbeat()
        step = heartbeat.get("saved") or 0
        line = {"attempt": number, "began": began, "ended": time.time(), "exit_status": status}
        line |= {"first_saved": first_step, "saved": step, "status": heartbeat.get("status")}
        with contextlib.suppress(OSError):
            if self._workdir.is_dir():
                file = self._workdir / "attempts" / f"{socket.gethostname()}.jsonl"
                file.parent.mkdir(exist_ok=True)
                with file.open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
        return status, step - first_step

    def _heartbeat(self):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self._workdir / "heartbeat.json").read_text())
        return {}

    def _is_over(self, status):
        return status in _FINAL or (status == 0 and self._heartbeat().get("status") == "finished")


def _workdir_of(command):
    for name, following in zip(command, [*command[1:], ""], strict=True):
        flag, _, value = name.partition("=")
        if flag.lstrip("-") == "workdir" and flag.startswith("-"):
            return Path(value or following)
    raise UserError("the command after -- has no --workdir; name the directory of the run")


def main(command):
    """Supervises."""
    if not command:
        raise UserError("name a command after --, such as -- train.py --config=... --workdir=...")
    supervisor = Supervisor(command, _workdir_of(command))
    return supervisor.run(_RESTARTS.value, _PAUSE.value)


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, rest = sys.argv[:at], sys.argv[at + 1 :]
    cli.run(lambda: main(rest))
