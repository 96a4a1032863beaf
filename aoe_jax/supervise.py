"""Starts a training command again until it has finished.

    python -m aoe_jax.supervise [--restarts=5] -- train.py --config=FILE --workdir=DIR ...

The arguments after `--` are those of Python, such as `train.py ...` or `-m aoe_jax.train ...`. The
supervisor starts this training command again after a preemption, a hang, a lost process, a fault of
the machine or an unforeseen error, and while another process owns the workdir. It stops after a
mistake of the user (exit status 2), divergence (4), Ctrl-C, or `--restarts` restarts in a row
without a new checkpoint.

After forwarding SIGTERM, SIGINT or SIGHUP (as SIGTERM) to the command, it ends with the command.
`--start-over` and `--go-back` are passed on until an attempt has moved the old files.
`WORKDIR/attempts/HOST.jsonl` has a line for every attempt. The exit status is 0 if the run has
finished, else that of the last attempt.
"""

import contextlib
import itertools
import json
import logging
import signal
import subprocess
import sys
import threading
import time

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import DivergedError, Failure, Interrupted, MachineFault, UserError
from aoe_jax.storage.files import COUNT, TEXT, or_none, read_json
from aoe_jax.storage.paths import host_name, is_remote, parsed_path

log = logging.getLogger("aoe_jax.supervise")  # `__name__` is `__main__` with `python -m`

_RESTARTS = flags.DEFINE_integer(
    "restarts", 5, "restarts in a row without a new checkpoint before giving up", lower_bound=0
)
_PAUSE = flags.DEFINE_float(
    "pause",
    5.0,
    "seconds before the first restart, doubled for each attempt without a new checkpoint",
    lower_bound=0,
)
_LONGEST_PAUSE = 60.0  # seconds; below --join_timeout, so that attempts on several hosts can join
_FINAL = {UserError.status, DivergedError.status, Interrupted.status}
# signal to the supervisor -> signal to the command
_PASSED_ON = {n: n for n in (signal.SIGTERM, signal.SIGINT)} | {signal.SIGHUP: signal.SIGTERM}
_HEARTBEAT = {"saved": or_none(COUNT), "status": or_none(TEXT)}


class Supervisor:
    """Runs a training command until it has finished, and passes signals on to it."""

    def __init__(self, command: list[str]):
        """`command` are arguments of Python. Raises `UserError` if they have no `--workdir`."""
        given, rest = _split(command)
        if not given["workdir"].value:
            raise UserError("the command after -- has no --workdir; name the directory of the run")
        self._workdir = parsed_path(given["workdir"].value, "--workdir", in_store=True)
        self._arguments = [*rest, f"--workdir={given['workdir'].value}"]
        self._moving = ["--start-over"] if given["start-over"].value else []
        self._moving += [f"--go-back={given['go-back'].value}"] if given["go-back"].value else []
        self._process, self._asked_to_stop = None, threading.Event()
        self._files = self._moving and self._files_of_run()
        for number in _PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup`
                signal.signal(number, self._pass_on)

    def _pass_on(self, number, frame):
        self._asked_to_stop.set()
        if self._process:
            self._process.send_signal(_PASSED_ON[number])  # no effect if it has ended

    def run(self, restarts: int, pause: float) -> int:
        """Returns 0 if the run has finished, else the last exit status (128 + N for signal N)."""
        idle, first = 0, self._heartbeat()

        def has_finished(heartbeat):
            return heartbeat.get("status") == "finished" and heartbeat != first

        for attempt in itertools.count(1):
            before, began = self._heartbeat(), time.time()
            if has_finished(before):  # by the other processes, since the last attempt
                return 0
            status = self._attempt()
            now = self._heartbeat()
            line = {"attempt": attempt, "began": began, "ended": time.time(), "exit_status": status}
            line |= {"first_saved": before.get("saved") or 0, "saved": now.get("saved") or 0}
            with contextlib.suppress(Exception):
                self._log(json.dumps(line | {"status": now.get("status")}) + "\n")
            if has_finished(now):
                return 0  # even if the process was killed after the run had finished
            idle = 0 if line["saved"] > line["first_saved"] else idle + 1
            if status in _FINAL or self._asked_to_stop.is_set():
                return status
            if idle > restarts:
                log.error(f"gave up: {idle} attempts in a row saved no new step")
                return status or MachineFault.status
            seconds = min(pause * 2.0 ** min(max(idle - 1, 0), 60), _LONGEST_PAUSE)
            ended = f"attempt {attempt} ended with status {status}"
            log.warning(f"{ended}; the next starts in {seconds:g} s")
            if self._asked_to_stop.wait(seconds):
                return status

    def _attempt(self):
        arguments = self._arguments
        if self._moving and self._files_of_run() == self._files:
            arguments = arguments + self._moving  # no earlier attempt has moved the old files
        # Uses a new session, so that the command receives a Ctrl-C only from this process.
        self._process = subprocess.Popen([sys.executable, *arguments], start_new_session=True)
        if self._asked_to_stop.is_set():  # a signal arrived before `_process` was set
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def _files_of_run(self):
        """`(names of the folders in set_aside/, whether the workdir has a run)`."""
        aside = self._workdir / "set_aside"
        folders = {path.name for path in aside.iterdir()} if aside.is_dir() else set()
        return folders, (self._workdir / "heartbeat.json").exists()

    def _heartbeat(self):
        """The heartbeat of the run; {} if it is missing or cannot be read."""
        with contextlib.suppress(Failure):
            return read_json(self._workdir / "heartbeat.json", schema=_HEARTBEAT)
        return {}

    def _log(self, line):
        file = self._workdir / "attempts" / f"{host_name()}.jsonl"
        file.parent.mkdir(exist_ok=True)
        # Objects in an object store cannot be appended to, so all lines are written again.
        before = file.read_text() if is_remote(file) and file.exists() else ""
        with file.open("w" if is_remote(file) else "a") as lines:
            lines.write(before + line)


def _split(command):
    """Returns `(flags of `train` that a supervisor handles, all other arguments)`."""
    given = flags.FlagValues()
    given.set_gnu_getopt()
    flags.DEFINE_string("workdir", None, "", flag_values=given)
    flags.DEFINE_string("go-back", None, "", flag_values=given)
    flags.DEFINE_bool("start-over", False, "", flag_values=given)
    try:
        return given, given(["python", *command], known_only=True)[1:]
    except flags.Error as e:
        raise UserError(f"the command after --: {e}") from e


def main(command):
    return Supervisor(command).run(_RESTARTS.value, _PAUSE.value)


def command():
    """Runs `main` with the arguments after `--` of the command line."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, rest = sys.argv[:at], sys.argv[at + 1 :]
    cli.run(lambda: main(rest))


if __name__ == "__main__":
    command()
