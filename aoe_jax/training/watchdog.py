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
from collections.abc import Callable
from pathlib import Path

import jax

from aoe_jax import faults
from aoe_jax.errors import Hang, Preempted
from aoe_jax.json_files import write_json
from aoe_jax.stopping import StopRequests
from aoe_jax.training.health import Heartbeat
from aoe_jax.training.run_folder import RunFolder

TERM_SECONDS = 20.0  # between a SIGTERM and the end of a blocked process
_WRITE_SECONDS = 15.0  # limit for writing files, because the disk may hang, too
_CLEAR_SECONDS = 1.0  # limit for clearing the terminal
_LOOK_SECONDS = 5.0  # limit for the reports of other processes


class Watchdog:
    """A context in which a thread watches the heartbeat of this process.

    If it does not move for `timeout` seconds (0: no limit), the process writes the stacks of its
    threads to `workdir/hang/process_N.txt`, says which processes are late, and exits with the
    status of `Hang`. If the heartbeat does not move for `TERM_SECONDS` after a SIGTERM, the process
    calls `save()`, which returns False if there is no consistent state, and exits. It calls
    `clear()` before it prints.
    """

    def __init__(
        self,
        workdir: Path,
        run_folder: RunFolder,
        heartbeat: Heartbeat,
        stop: StopRequests,
        timeout: float,
        save: Callable[[], bool],
        clear: Callable[[], None],
    ):
        """Takes the workdir as a path and as the folder of the run."""
        self._folder, self._heartbeat, self._stop = workdir / "hang", heartbeat, stop
        self._timeout, self._save, self._run_folder = timeout, save, run_folder
        self._clear = clear
        self._ended = threading.Event()

    def __enter__(self):
        self._heartbeat.moved = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception):
        self._ended.set()

    def _watch(self):
        while not self._ended.wait(0.2):
            # A wait for a disk ends by itself, and compilation has no limit.
            now, moved = time.monotonic(), max(self._heartbeat.moved, faults.paused_at)
            hangs = self._timeout and self._heartbeat.status != "compiling"
            if hangs and now > moved + self._timeout:
                self._end_hang(now - moved)
            term = self._stop.terminated
            if term is not None and now > max(term, moved) + TERM_SECONDS:
                self._end_terminated()

    def _end_hang(self, seconds):
        _in_time(_CLEAR_SECONDS, self._clear)
        late = _in_time(_WRITE_SECONDS, lambda: self._report(seconds))
        if late is None:  # the disk hangs or fails
            faulthandler.dump_traceback(sys.stderr)
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
        with tempfile.TemporaryFile("w+") as file:
            print(f"{self._where()} on {socket.gethostname()}, {seconds:.0f} s", file=file)
            file.flush()
            faulthandler.dump_traceback(file)
            file.seek(0)
            (self._folder / f"process_{process}.txt").write_text(file.read())
        path = self._folder / f"process_{process}.json"
        write_json(
            path,
            {"nonce": self._run_folder.nonce, "step": heartbeat.step, "status": heartbeat.status},
        )
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
        said += [] if said else ["all processes are at this step"]
        return f"{'; '.join(said)}; stacks are in {self._folder}"

    def _steps(self):
        """The step of every process that has written a report, None for the others."""
        steps = [None] * jax.process_count()
        for process in range(len(steps)):
            with contextlib.suppress(OSError, ValueError):
                report = json.loads((self._folder / f"process_{process}.json").read_text())
                if report["nonce"] == self._run_folder.nonce:
                    steps[process] = report["step"]
        return steps

    def _end_terminated(self):
        _in_time(_CLEAR_SECONDS, self._clear)
        saved = _in_time(_WRITE_SECONDS, self._save)
        what = "saved" if saved else "nothing new could be saved"
        self._exit(
            Preempted.status,
            f"preempted: {self._where()} made no progress for {TERM_SECONDS:g} s after SIGTERM; "
            f"{what}; the same command goes on from the newest checkpoint",
        )

    def _exit(self, status, last_line):
        print(last_line, file=sys.stderr, flush=True)
        _in_time(_LOOK_SECONDS, self._run_folder.release)
        os._exit(status)

    def _where(self):
        heartbeat = self._heartbeat
        return f"process {jax.process_index()}, {heartbeat.status}, after step {heartbeat.step}"


def _in_time(seconds, call):
    """Returns `call()`, or None if it does not return in time or raises an exception."""
    results = []

    def run():
        with contextlib.suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
