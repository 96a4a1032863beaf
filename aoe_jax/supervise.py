"""Starts a training command again until it has finished.

    python -m aoe_jax.supervise [--restarts=5] -- train.py --config=FILE --workdir=DIR ...

The arguments after `--` are those of Python, such as `train.py ...` or `-m aoe_jax.train ...`. The
command is started again after a preemption, a hang, a lost process, a fault of the machine or an
unforeseen error, and while another process owns the workdir, such as one that still saves; not
after a mistake of the user (exit status 2), divergence (4) or Ctrl-C. The supervisor gives up after
`--restarts` restarts in a row that saved no new step. While the files of a run that has begun are
gone, as on a disk that is no longer mounted, it only waits, because a start would begin a new run;
each wait counts as a restart.

It passes SIGTERM, SIGINT and SIGHUP (as SIGTERM) on, and ends with the command. If it is killed,
the command gets SIGTERM (on Linux). Attempts get `--start-over` and `--go-back` until the run has
begun anew or gone back, later ones `--resume-only`, and only the first gets `--take-over`.
`WORKDIR/attempts/HOST.jsonl` has a line for every attempt; in an object store, where each is
written as a new object, supervisors of one host may lose lines of each other. The exit status is 0
if the run has finished, else that of the last attempt, where signal N counts as 128 + N.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import DivergedError, Interrupted, MachineFault, UserError
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, or_none, read_json
from aoe_jax.storage.paths import is_remote, parsed_path
from aoe_jax.storage.retry import is_fault, reason
from aoe_jax.training.stopping import bound

log = logging.getLogger("aoe_jax.supervise")  # not __name__, which is __main__

_RESTARTS = flags.DEFINE_integer(
    "restarts", 5, "restarts in a row without a new step before it gives up", lower_bound=0
)
_PAUSE = flags.DEFINE_float(
    "pause",
    5.0,
    "seconds before the first restart, doubled for each attempt without a new step",
    lower_bound=0,
)
_LOOK_EVERY = 0.5  # seconds until a run that has begun is seen
_LONGEST_PAUSE = 60.0  # seconds; several supervisors must meet within --join_timeout
_MOST_DOUBLINGS = 60  # of the pause, so that it stays a float after any number of attempts
_FINAL = {UserError.status, DivergedError.status, Interrupted.status}
_PASSED_ON = {  # signal to the supervisor -> signal to the command
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}
_MOVES_FILES = ("start-over", "go-back")


class Supervisor:
    """Runs a command again and again, and passes signals on to it."""

    def __init__(self, command: list[str], workdir):
        """`command` are arguments of Python, and `workdir` is the directory of their run."""
        self._command, self._workdir = [sys.executable, *command], workdir
        self._process, self._asked_to_stop = None, threading.Event()
        self._has_begun, self._history = False, None
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number, frame):
        self._asked_to_stop.set()
        if self._process:
            self._process.send_signal(_PASSED_ON[number])  # nothing, if the process has ended

    def run(self, restarts: int, pause: float) -> int:
        """Returns the exit status of the last attempt."""
        attempt, idle, before = 0, 0, None
        while True:
            attempt += 1
            if before is None and (before := self._heartbeat()) is not None:
                self._history = before.get("history")
            if before is not None:
                self._look_for_beginning()
            if before is None or (self._has_begun and self._has_heartbeat() is False):
                why = "cannot be read" if before is None else "is gone; is its disk mounted?"
                log.warning(f"{self._workdir}/heartbeat.json {why}")
                status, steps = MachineFault.status, 0
            else:
                status, steps = self._attempt(attempt)
            idle = 0 if steps > 0 else idle + 1
            now = self._heartbeat() or {}
            if now.get("status") == "finished" and before is not None and now != before:
                return 0  # also if the process was killed after that
            if status in _FINAL or self._asked_to_stop.is_set():
                return status
            if idle > restarts:
                log.error(f"gave up: {idle} attempts in a row saved no new step")
                return status
            seconds = min(pause * 2 ** min(max(idle - 1, 0), _MOST_DOUBLINGS), _LONGEST_PAUSE)
            log.warning(
                f"attempt {attempt} ended with status {status}; the next starts in {seconds:g} s"
            )
            if self._asked_to_stop.wait(seconds):
                return status

    def _look_for_beginning(self):
        """Once the run has begun, or has begun anew or gone back as asked, attempts only resume
        it, because its disk may vanish before they look.
        """
        resumes = _without(_MOVES_FILES, self._command)
        if self._command == resumes:
            has_begun = self._has_heartbeat() is True
        else:  # that changes the history
            history = (self._heartbeat() or {}).get("history", self._history)
            has_begun = history != self._history
        if has_begun and not self._has_begun:
            self._command = [*_without(("resume-only",), resumes), "--resume-only"]
            self._has_begun = True

    def _attempt(self, number):
        """Runs the command once; returns its exit status and the number of steps it added."""
        first_step, began = _saved(self._heartbeat() or {}), time.time()
        status = self._run_command()
        heartbeat = self._heartbeat() or {}
        step = _saved(heartbeat)
        line = {"attempt": number, "began": began, "ended": time.time(), "exit_status": status}
        line |= {"first_saved": first_step, "saved": step, "status": heartbeat.get("status")}
        with contextlib.suppress(Exception):
            if self._workdir.is_dir():
                self._log(json.dumps(line) + "\n")
        return status, step - first_step

    def _log(self, line):
        file = self._workdir / "attempts" / f"{socket.gethostname()}.jsonl"
        file.parent.mkdir(exist_ok=True)
        if is_remote(file):  # a store cannot append to an object
            file.write_text((file.read_text() if file.exists() else "") + line)
            return
        with open(file, "a", opener=_open_own) as lines:
            lines.write(line)

    def _run_command(self):
        """Runs the command once; returns its exit status, 5 if a fault prevents its start."""
        try:
            # Its own session: a Ctrl-C in the terminal must reach it only once, through this
            # process.
            self._process = subprocess.Popen(bound(self._command), start_new_session=True)
        except OSError as e:
            if not is_fault(e):
                raise
            log.warning(f"the command cannot be started ({reason(e)})")
            return MachineFault.status
        self._command = _without(("take-over",), self._command)
        if self._asked_to_stop.is_set():  # it came while the process was made
            self._process.send_signal(signal.SIGTERM)
        ended = threading.Event()
        # Not this thread, which passes signals on: a disk may hang.
        threading.Thread(target=self._look_until, args=[ended], daemon=True).start()
        status = self._process.wait()
        ended.set()
        return status if status >= 0 else 128 - status  # like shells, if a signal ended it

    def _look_until(self, ended):
        while not self._has_begun and not ended.wait(_LOOK_EVERY):
            self._look_for_beginning()

    def _heartbeat(self):
        """The heartbeat of the run, empty if there is none; None while its disk fails."""
        path = self._workdir / "heartbeat.json"
        step = or_none(COUNT)
        schema = {"saved": step, "copied": step, "status": or_none(TEXT), "time": or_none(NUMBER)}
        schema |= {"history": or_none(COUNT)}
        try:
            return read_json(path, schema=schema)
        except MachineFault:
            return None
        except Exception:  # the next attempt says why it cannot be read
            return {}

    def _has_heartbeat(self):
        with contextlib.suppress(Exception):
            return (self._workdir / "heartbeat.json").exists()
        return None  # unknown: the disk or store fails


def _open_own(path, flags):
    # Opening a FIFO would wait for a reader, and a link leads elsewhere.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)


def _saved(heartbeat):
    """The newest step that a run can continue from, by its heartbeat."""
    return max(heartbeat.get("saved") or 0, heartbeat.get("copied") or 0)


def _without(names, command):
    """The command without some flags and their values."""
    kept, is_value = [], False
    for argument in command:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_flag = argument.startswith("-") and name.replace("_", "-") in names
        if not is_flag and not is_value:
            kept.append(argument)
        is_value = is_flag and name == "go-back" and not equals
    return kept


def _workdir_of(command):
    workdir = ""
    for name, following in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = name.partition("=")
        if flag in ("-workdir", "--workdir"):
            workdir = value if equals else following  # the last one counts
    if not workdir:
        raise UserError("the command after -- has no --workdir; name the directory of the run")
    return parsed_path(workdir, "--workdir", in_store=True)


def main(command):
    if not command:
        raise UserError("name a command after --, such as -- train.py --config=... --workdir=...")
    supervisor = Supervisor(command, _workdir_of(command))
    return supervisor.run(_RESTARTS.value, _PAUSE.value)


def command():
    """Runs `main` with what follows `--` on the command line."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, rest = sys.argv[:at], sys.argv[at + 1 :]
    cli.run(lambda: main(rest))


if __name__ == "__main__":
    command()
