"""Writers of a run's figures: `metrics.jsonl`, TensorBoard files and, on request, Weights & Biases.

A writer begins at `start_step`, from which the run continues. It drops or hides the figures of
later steps, which an earlier attempt wrote. `write(step, group, scalars, layers, experts)` takes
the figures of one step: `group` is `train` or `validation`, `scalars` maps names to numbers,
`layers` names to arrays `[L]`, and `experts` names to arrays `[L, n]` (L layers, n experts). Only
TensorBoard keeps the last, as histograms over experts.
"""

import errno
import filecmp
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.storage.files import TEXT, finite, read_json, read_metrics, write_json, write_whole
from aoe_jax.storage.paths import move
from aoe_jax.training.workdir import folder_aside

# tensorboardX imports PyTorch if it is installed, which takes seconds and is not needed here.
_has_torch = sys.modules.setdefault("torch", None)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import histogram, image
finally:
    if not _has_torch:
        del sys.modules["torch"]

log = logging.getLogger(__name__)

_IDENTITY = {"project": TEXT, "id": TEXT}  # of a run at Weights & Biases
_UPLOAD_SECONDS = 60.0  # at the end of a run; `wandb sync` uploads the rest


class JsonLines:
    """One JSON object a line, null for numbers that are not finite.

    A line survives a kill of the process as soon as it is written; lines that cannot be written are
    kept for the next write. Lines after `start_step` are dropped, and, unless `validated`, the
    validation of that step. The whole file is kept in `set_aside/` if the last of them is more than
    `2 * every` steps later (`every` is `checkpoint.every`), or if lines are dropped that are no
    figures.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, start_step, every, validated=True):
        def is_kept(line):
            return line["step"] < start_step + (validated or "validation_nll" not in line)

        newest = n_lines = self.compute_seconds = 0
        for line in read_metrics(path):  # in pieces: all lines as objects may not fit into memory
            newest, n_lines = max(newest, line["step"]), n_lines + 1
            if is_kept(line):
                self.compute_seconds += line.get("compute_seconds") or 0
        # A kill leaves up to two intervals, since the last save may be incomplete, and half a line.
        if newest - start_step > 2 * every or _line_ends(path) > n_lines:
            _set_aside(path)
        kept = filter(is_kept, read_metrics(path))
        write_whole(path, ((json.dumps(line) + "\n").encode() for line in kept))
        self._file, self._unwritten = path.open("r+b", buffering=0), b""
        self._size = self._file.seek(0, os.SEEK_END)  # size of the whole lines

    def write(self, step, group, scalars, layers, experts):
        line = {"step": step} | scalars
        if layers:
            line["layers"] = {name: _shortest(values) for name, values in layers.items()}
        self._unwritten += (json.dumps(finite(line)) + "\n").encode()
        self._flush()

    def _flush(self):
        self._file.seek(self._size)  # a write that failed may have left half a line
        written = self._file.write(self._unwritten)
        self._size = self._file.tell()
        self._unwritten = self._unwritten[written:]
        if self._unwritten:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self):
        """Waits until all lines would survive a power cut."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self):
        with self._file:
            self._flush()


def _line_ends(path):
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))


def _set_aside(path):
    copies = path.parent.glob(f"set_aside/*/{path.name}.whole")
    if any(filecmp.cmp(copy, path, shallow=False) for copy in copies):
        return
    copy = path.with_name(f"{path.name}.whole")
    shutil.copyfile(path, copy)
    target = folder_aside(path.parent) / copy.name
    move(copy, target)
    where = target.relative_to(path.parent)
    log.warning(f"{path.name} has lines that this run drops; the whole file is in {where}")


def _shortest(values):
    """Numbers with only the digits that identify a float32."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(str(value)) for value in values.astype(np.float32)]


def _tags(group, scalars, layers):
    """All numbers by the names of their charts."""
    tags = {f"{group}/{name.removeprefix(group + '_')}": value for name, value in scalars.items()}
    for name, values in layers.items():
        for layer, value in enumerate(values.tolist()):
            tags[f"experts/{name}/layer_{layer}"] = value
    return tags


class TensorBoard:
    """Event files, in which events of later steps from a run that was killed are hidden."""

    name = "tensorboard/"

    def __init__(self, folder: Path, start_step):
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter has a queue, which a kill of the process would lose.
        self._events = EventsWriter(str(folder / "events"))
        self._add(start_step + 1, file_version="brain.Event:2")
        self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()

    def write(self, step, group, scalars, layers, experts):
        # One event for all takes a tenth of the time of one for each.
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in _tags(group, scalars, layers).items()
        ]
        for name, of_layers in experts.items():
            for layer, of_experts in enumerate(of_layers):
                if np.isfinite(of_experts).all():
                    tag = f"histograms/{name}/layer_{layer}"
                    values += histogram(tag, of_experts, bins=16).value
        self._add(step, summary=Summary(value=values))

    def draw(self, step, name, figure):
        """Writes a matplotlib `Figure` as a picture, which takes a tenth of a second or more."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._add(step, summary=image(name, pixels, dataformats="HWC"))

    def close(self):
        self._events.close()


class Wandb:
    """A run at Weights & Biases, which continues under the id in `wandb.json`.

    Points are placed by their `step`; a run that was killed sends later steps again. Raises
    `UserError` if Weights & Biases refuses, for example without a login, and `ConnectionError` if
    it cannot be reached.
    """

    name = "wandb"

    def __init__(self, workdir: Path, project, config):
        import wandb  # an optional dependency

        file = workdir / "wandb.json"
        if not file.exists():
            write_json(file, {"project": project, "id": secrets.token_hex(4)})
        identity = read_json(file, schema=_IDENTITY)
        try:
            self._run = wandb.init(
                project=identity["project"],
                id=identity["id"],
                resume="allow",
                name=workdir.absolute().name,
                dir=str(workdir),
                config=config,
                # stdout and stderr stay as they are
                settings=wandb.Settings(console="off", finish_timeout=_UPLOAD_SECONDS),
            )
        except wandb.Error as e:
            reason = " ".join(str(e).split())[:200]
            refused = wandb.errors.AuthenticationError | wandb.errors.UsageError
            if not isinstance(e, refused) and not re.search(r"error 4\d\d", reason):
                raise ConnectionError(reason) from e
            raise UserError(
                f"--wandb={project}: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from e
        self._run.define_metric("*", step_metric="step")

    def write(self, step, group, scalars, layers, experts):
        self._run.log({"step": step, **_tags(group, scalars, layers)})

    def close(self):
        self._run.finish()


def check_wandb(workdir: Path, project):
    """Raises `UserError` if the project is empty, the package is missing, or the run in `workdir`
    belongs to another project; writes nothing.
    """
    require_flag(project, "wandb", project, "name a project")
    identity = workdir / "wandb.json"
    found = read_json(identity, schema=_IDENTITY)["project"] if identity.exists() else project
    wanted = f"the run in {workdir} belongs to project {found}; name that one, or leave it out"
    require_flag(found == project, "wandb", project, wanted)
    try:
        import wandb  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"--wandb={project}: the package {e.name} is missing; pip install 'aoe_jax[wandb]'"
        ) from e
