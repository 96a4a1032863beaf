"""Writers of a run's metrics: `metrics.jsonl`, TensorBoard.

`write(step, group, scalars, layers, experts)` writes the metrics of one step. `group` is `train` or
`validation`; `scalars` is `{name: number}`, `layers` is `{name: array [L]}`, and `experts` is
`{name: array [L, n]}` for L layers and n experts. Only TensorBoard writes `experts`, as histograms.
`close()` writes buffered metrics and closes the files.
"""

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

from aoe_jax.errors import UserError
from aoe_jax.storage.files import finite, write_whole
from aoe_jax.storage.paths import move, unused

# tensorboardX must not import PyTorch, which takes seconds and is not needed for these events.
_has_torch = sys.modules.setdefault("torch", None)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import histogram
    from tensorboardX.summary import text as text_summary
finally:
    if not _has_torch:
        del sys.modules["torch"]

log = logging.getLogger(__name__)


class JsonLines:
    """Writes one JSON object per line, with null for numbers that are not finite.

    A kill loses no written line. Lines that cannot be written stay in memory until the next write.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, size: int | None):
        """Keeps the first `size` bytes (None: all), the lines up to a checkpoint; deletes the rest.
        Raises `UserError` if no line of the file ends at byte `size`.
        """
        self._path, self._file = path, open(path, "a+b", buffering=0)  # noqa: SIM115
        there = self._file.seek(0, os.SEEK_END)
        size = there if size is None else size
        self._file.seek(max(size - 1, 0))
        if there < size or (size and self._file.read(1) != b"\n"):
            self._file.close()
            lost = f"it had {size} bytes at the checkpoint, and now has {there} bytes"
            raise UserError(
                f"{path} has lost lines: {lost}. Bring it back; or --start-over begins anew"
            )
        if dropped := self._file.read().count(b"\n"):
            log.info(f"{path.name}: dropped {dropped} lines of steps after the checkpoint")
        self._file.truncate(size)
        self._size, self._unwritten, self._failed = size, b"", False

    def write(self, step, group, scalars, layers, experts):
        line = {"step": step} | scalars
        if layers:
            line["layers"] = {name: _shortest(values) for name, values in layers.items()}
        self._unwritten += (json.dumps(finite(line)) + "\n").encode()
        self._flush()

    def _flush(self):
        if self._failed:  # deletes a part of a line that the previous write may have left
            self._file.truncate(min(self._size, self._file.seek(0, os.SEEK_END)))
        self._failed = True
        written = self._file.write(self._unwritten)
        if written < len(self._unwritten):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._unwritten, self._failed = self._size + written, b"", False

    def sync(self) -> int:
        """Puts all lines on the disk, even if the file was replaced; returns the file's size."""
        self._flush()
        try:
            if not self._path.exists() or not self._path.samefile(f"/dev/fd/{self._file.fileno()}"):
                self._restore()
        except OSError as e:  # the save of the checkpoint must go on
            log.warning(f"{self._path} was removed or replaced, and cannot be written again ({e})")
        size = self._file.seek(0, os.SEEK_END)
        if size != self._size:
            log.warning(f"{self._path} was edited: it had {self._size} bytes, now {size}")
            self._file.seek(max(size - 1, 0))
            self._size = size + self._file.write(b"" if self._file.read(1) in b"\n" else b"\n")
        os.fsync(self._file.fileno())
        return self._size

    def _restore(self):
        target, kept = Path(os.path.realpath(self._path)), ""
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            aside = unused(self._path.with_name(f"{self.name}.replaced"))
            move(target, aside)
            kept = f"; what was there is now {aside.name}"
        self._file.seek(0)
        write_whole(target, self._file.read(self._size))
        opened, self._file = self._file, open(target, "a+b", buffering=0)  # noqa: SIM115
        opened.close()
        log.warning(f"{self._path} was removed or replaced; wrote its lines again{kept}")

    def close(self):
        with self._file:
            self._flush()


def _shortest(values):
    """Returns a list of numbers that print with only the digits that identify a float32."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(str(value)) for value in values.astype(np.float32)]


def tags(group, scalars, layers):
    """Returns `{name of a chart: number}`."""
    tags = {f"{group}/{name.removeprefix(group + '_')}": value for name, value in scalars.items()}
    for name, values in layers.items():
        for layer, value in enumerate(values.tolist()):
            tags[f"experts/{name}/layer_{layer}"] = value
    return tags


class TensorBoard:
    """Writes event files. A `START` event hides a killed run's steps after `start_step`."""

    name = "tensorboard/"

    def __init__(self, folder: Path, start_step):
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter is not used: after a fault, its `flush` would wait forever.
        self._events = EventsWriter(str(folder / "events"))
        self._add(start_step + 1, file_version="brain.Event:2")
        self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()

    def write(self, step, group, scalars, layers, experts):
        # Writing all values as one event takes a tenth of the time of one event per value.
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in tags(group, scalars, layers).items()
        ]
        for name, of_layers in experts.items():
            for layer, of_experts in enumerate(of_layers):
                if np.isfinite(of_experts).all():
                    tag = f"histograms/{name}/layer_{layer}"
                    values += histogram(tag, of_experts, bins=16).value
        self._add(step, summary=Summary(value=values))

    def write_text(self, step, text):
        self._add(step, summary=text_summary("sample", text))

    def close(self):
        self._events.close()
