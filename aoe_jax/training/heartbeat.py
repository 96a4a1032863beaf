"""Writes the status of a run to `heartbeat.json`, and ends a process that hangs."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

from aoe_jax.errors import DivergedError, Hang, Interrupted, MachineFault, Preempted, UserError
from aoe_jax.storage.files import write_json
from aoe_jax.storage.paths import host_name, is_remote
from aoe_jax.storage.retry import Tolerated

_UNLIMITED = ("preparing", "compiling")  # statuses that may last longer than `train.hang_timeout`
_LOOK = 0.2  # seconds between two checks of the heartbeat
_REPORT_SECONDS = 15.0  # time limit for writing the stacks, because the disk may hang
_ENDS = {Preempted: "preempted", Interrupted: "interrupted", DivergedError: "diverged"}


class Heartbeat:
    """A context in which `beat` records the status of the run.

    If `beat` is not called for `timeout` seconds (0: no limit), the process writes the stacks of
    its threads to `workdir/hang/process_N.txt` and exits with the status of `Hang`. Compilation and
    data preparation have no limit. Time in which the whole process is suspended does not count.
    """

    def __init__(self, workdir: Path, timeout: float):
        self._workdir, self._timeout = workdir, timeout
        self._pause = 10 if is_remote(workdir) else 1  # seconds between writes of the same status
        self._ended, self._tolerated = threading.Event(), Tolerated("heartbeat.json")
        self._status, self._step, self._written = "restoring", None, None
        self._moved, self.saved, self._began = time.monotonic(), None, None

    def __enter__(self):
        if self._timeout:
            threading.Thread(target=self._watch, daemon=True, name="watches the heartbeat").start()
        return self

    def begin(self, saved, began, is_owner=lambda: True):
        """From now on `beat` writes the file while `is_owner()`; only process 0 calls this method.
        `saved` is the step of the newest checkpoint, `began` the time of the run's first start.
        """
        self.saved, self._began, self._is_owner = saved, began, is_owner

    def beat(self, status, step=None):
        """Records a status and, if given, the step. Writes the file when the status changes, and
        otherwise at most once per second on a disk or every ten seconds in an object store.
        """
        self._step = self._step if step is None else step
        before, self._status, self._moved = self._status, status, time.monotonic()
        is_recent = self._written is not None and self._moved < self._written + self._pause
        if self._began is None or (status == before and is_recent):
            return
        self._written = self._moved
        value = {"status": status, "step": self._step, "saved": self.saved, "time": time.time()}
        value |= {"began": self._began, "host": host_name(), "pid": os.getpid()}
        with self._tolerated:
            if self._is_owner():
                write_json(self._workdir / "heartbeat.json", value)

    def end(self, kind, error, trace):
        """Writes the last status; an exit function that runs before the lease is released."""
        # Writes nothing after a `UserError` or `MachineFault`: another process may own the file.
        if error and self._status != "finished" and not isinstance(error, UserError | MachineFault):
            self.beat(_ENDS.get(kind, "failed"))
        if error is not None and self._step is not None:
            alone = jax.process_count() == 1
            again = "the same command goes on" if alone else "start all processes again: they go on"
            error.add_note(f"after step {self._step}; {again} from the newest checkpoint")

    def __exit__(self, *_):
        self._ended.set()

    def _watch(self):
        looked = time.monotonic()
        while not self._ended.wait(_LOOK):
            now = time.monotonic()
            if now - looked > 10 * _LOOK:  # this thread was suspended with the whole process
                self._moved = now
            looked = now
            if self._status not in _UNLIMITED and now > self._moved + self._timeout:
                reporting = threading.Thread(target=self._report, args=[now - self._moved])
                reporting.daemon = True
                reporting.start()
                reporting.join(_REPORT_SECONDS)
                os._exit(Hang.status)

    def _report(self, seconds):
        process, folder = jax.process_index(), self._workdir / "hang"
        after = "" if self._step is None else f", after step {self._step}"
        message = (
            f"error: process {process} ({self._status}{after}) made no progress for {seconds:.0f} "
            f"s (train.hang_timeout={self._timeout:g}); its stacks are in {folder}"
        )
        with tempfile.TemporaryFile("w+") as file:  # `faulthandler` writes to files only
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        print(f"{stacks}\n{message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"process_{process}.txt").write_text(f"{message}\n{stacks}")
