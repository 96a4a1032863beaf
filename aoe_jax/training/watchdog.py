"""Ends a process that hangs, or that is blocked after a SIGTERM."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax

from aoe_jax.errors import Hang, Preempted
from aoe_jax.storage import retry
from aoe_jax.storage.files import write_json
from aoe_jax.training.health import Heartbeat
from aoe_jax.training.run_folder import RunFolder
from aoe_jax.training.stopping import StopRequests

TERM_SECONDS = 20.0  # between a SIGTERM and the end of a blocked process; more if steps take longer
_WRITE_SECONDS = 15.0  # limit for writing files, because the disk may hang, too
_PRINT_SECONDS = 1.0  # limit for the terminal, or the pipe, which may hang or be closed
_LOOK_SECONDS = 5.0  # limit for the reports of other processes
_UNLIMITED = ("preparing", "compiling")  # statuses that may last longer than `train.hang_timeout`


class Watchdog:
    """A context in which a thread watches the heartbeat of this process.

    If it does not move for `timeout` seconds (0: no limit), the process writes the stacks of its
    threads to `workdir/hang/process_N.txt`, says which processes are late, and exits with the
    status of `Hang`. If the heartbeat does not move for `TERM_SECONDS` after a SIGTERM, or for
    twice the time of a slow step, the process calls `save()`, which returns False if there is no
    consistent state, and exits. A save that has begun is not ended by a SIGTERM. The process calls
    `clear()` before it prints. Both are attributes that a run sets.
    """

    def __init__(
        self, run_folder: RunFolder, heartbeat: Heartbeat, stop: StopRequests, timeout: float
    ):
        """Watches once the context is entered."""
        self._run_folder, self._folder = run_folder, run_folder.workdir / "hang"
        self._heartbeat, self._stop, self._timeout = heartbeat, stop, timeout
        self.save, self.clear = lambda: False, lambda: None
        self._ended = threading.Event()

    def __enter__(self):
        self._heartbeat.moved = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception):
        self._ended.set()

    def _watch(self):
        while not self._ended.wait(0.2):
            heartbeat, term = self._heartbeat, getattr(self._stop, "terminated", None)
            # A wait for a disk ends by itself.
            now, moved = time.monotonic(), max(heartbeat.moved, retry.paused_at)
            if self._timeout and heartbeat.status not in _UNLIMITED and now > moved + self._timeout:
                self._end_hang(now - moved)
            if term is not None and heartbeat.status != "saving":
                blocked = now - max(term, moved)
                if blocked > max(TERM_SECONDS, 2 * heartbeat.slowest):
                    self._end_terminated(blocked)

    def _end_hang(self, seconds):
        _in_time(_PRINT_SECONDS, self.clear)
        late = _in_time(_WRITE_SECONDS, lambda: self._report(seconds))
        if late is None:  # the disk hangs or fails
            _in_time(_PRINT_SECONDS, lambda: print(_stacks(), file=sys.stderr))
            late = f"its report cannot be written to {self._folder}"
        self._exit(
            Hang.status,
            f"error: {self._where()} made no progress for {seconds:.0f} s (train.hang_timeout="
            f"{self._timeout:g}): {late}",
        )

    def _report(self, seconds):
        """Writes the report of this process; returns a summary of the reports of all processes."""
        process, heartbeat = jax.process_index(), self._heartbeat
        self._folder.mkdir(parents=True, exist_ok=True)
        first_line = f"{self._where()} on {socket.gethostname()}, {seconds:.0f} s"
        path = self._folder / f"process_{process}.txt"
        path.write_text(f"{first_line}\n{_stacks()}")
        step = heartbeat.step or 0  # it is not known yet while the files of a run are looked at
        report = {"nonce": self._run_folder.nonce, "step": step, "status": heartbeat.status}
        write_json(path.with_suffix(".json"), report)
        if jax.process_count() == 1:
            return f"its stacks are in {self._folder}"
        deadline = time.monotonic() + _LOOK_SECONDS
        while None in (steps := self._steps()) and time.monotonic() < deadline:
            time.sleep(0.2)
        silent = [i for i, step in enumerate(steps) if step is None]
        newest = max((step for step in steps if step is not None), default=0)
        behind = [i for i, step in enumerate(steps) if step is not None and step < newest]
        said = [f"no report from process {', '.join(map(str, silent))}"] if silent else []
        said += [f"process {', '.join(map(str, behind))} is behind"] if behind else []
        said += [] if said else ["no process is behind"]
        return f"{'; '.join(said)}; stacks are in {self._folder}"

    def _steps(self):
        """The step of every process that has written a report, None for the others."""
        steps = [None] * jax.process_count()
        for process in range(len(steps)):
            with contextlib.suppress(OSError, ValueError):
                report = json.loads((self._folder / f"process_{process}.json").read_text())
                if report["nonce"] == self._run_folder.nonce is not None:
                    steps[process] = report["step"]
        return steps

    def _end_terminated(self, seconds):
        _in_time(_PRINT_SECONDS, self.clear)
        saved = _in_time(_WRITE_SECONDS, self.save)
        what = "saved" if saved else "nothing new could be saved"
        self._exit(
            Preempted.status,
            f"preempted: {self._where()} made no progress for {seconds:.0f} s after SIGTERM; "
            f"{what}; the same command goes on from the newest checkpoint",
        )

    def _exit(self, status, last_line):
        _in_time(_PRINT_SECONDS, lambda: print(last_line, file=sys.stderr, flush=True))
        _in_time(_LOOK_SECONDS, self._run_folder.release)
        os._exit(status)

    def _where(self):
        heartbeat = self._heartbeat
        after = "" if heartbeat.step is None else f", after step {heartbeat.step}"
        return f"process {jax.process_index()} ({heartbeat.status}{after})"


def _stacks():
    """The stacks of all threads. `faulthandler` needs a file, and stops all threads until it has
    written it: on Linux the file is in memory, because disks may hang.
    """
    on_linux = hasattr(os, "memfd_create")
    opened = open(os.memfd_create("stacks"), "w+") if on_linux else tempfile.TemporaryFile("w+")  # noqa: SIM115
    with opened as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def _in_time(seconds, call):
    """Returns `call()`, or None if it does not return in time or raises an exception."""
    with contextlib.suppress(Exception):
        return ThreadPoolExecutor(1).submit(call).result(seconds)
    return None
