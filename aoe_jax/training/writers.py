"""Writers of a run's metrics: `metrics.jsonl`, TensorBoard, the progress bar, Weights & Biases.

`write(step, group, scalars, layers, experts)` takes the metrics of one step: `group` is `train` or
`validation`, `scalars` maps names to numbers, `layers` names to arrays `[L]`, and `experts` names
to arrays `[L, n]` (L layers, n experts). Only TensorBoard keeps the last, as histograms.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.storage.files import TEXT, finite, read_json, write_json

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
    kept for the next write.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, size: int):
        """Goes on after the first `size` bytes, the lines up to a checkpoint; later ones are
        dropped. Raises `UserError` if the file has lost some of them.
        """
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        there = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - 1, 0))
        if there < size or (size and self._file.read(1) != b"\n"):
            self._file.close()
            raise UserError(
                f"{path} has lost lines: its checkpoint was saved after {size} bytes of lines, it "
                f"has {there} bytes. Bring it back; or --start-over begins anew"
            )
        dropped = self._file.read().count(b"\n")
        if dropped:
            log.info(f"{path.name}: dropped {dropped} lines of steps after the checkpoint")
        self._file.truncate(size)
        self._size, self._unwritten, self._failed = size, b"", False

    def write(self, step, group, scalars, layers, experts):
        """Adds a line."""
        line = {"step": step} | scalars
        if layers:
            line["layers"] = {name: _shortest(values) for name, values in layers.items()}
        self._unwritten += (json.dumps(finite(line)) + "\n").encode()
        self._flush()

    def _flush(self):
        if self._failed:  # that may have left half a line
            self._file.truncate(self._size)
        self._failed = True
        written = self._file.write(self._unwritten)
        if written < len(self._unwritten):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._unwritten, self._failed = self._size + written, b"", False

    def sync(self) -> int:
        """Waits until all lines would survive a power cut; returns the size of the file."""
        self._flush()
        os.fsync(self._file.fileno())
        return self._size

    def close(self):
        """Writes what is left."""
        with self._file:
            self._flush()


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
        # tensorboardX's SummaryWriter has a thread, for which a flush waits for ever after a fault.
        self._events = EventsWriter(str(folder / "events"))
        self._add(start_step + 1, file_version="brain.Event:2")
        self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()

    def write(self, step, group, scalars, layers, experts):
        """Adds a point to each chart."""
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
        """Writes what is left."""
        self._events.close()


class Bar:
    """The last line of a terminal: step, time left, loss, speed and load; the log is above it."""

    name = "the progress bar"

    def __init__(self, first_step, steps):
        self._held = contextlib.ExitStack()
        logs = logging_redirect_tqdm([logging.getLogger("aoe_jax")])
        self._held.enter_context(logs)
        bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)
        self._bar = self._held.enter_context(bar)

    def write(self, step, group, scalars, layers, experts):
        """Shows the metrics of a logged step; `load max` is the largest load over the mean."""
        if group == "train":
            shown = {"loss": f"{scalars['loss']:.4f}"}
            shown["tokens/s"] = f"{scalars['tokens_per_second']:,.0f}"
            if layers:
                shown["load max"] = f"{layers['load_max_over_mean'].mean():.2f}x"
            self._bar.set_postfix(shown, refresh=False)

    def step(self, step):
        """Shows a finished step, logged or not."""
        self._bar.update(step - self._bar.n)

    def close(self):
        """Erases the line; the log is written directly again."""
        self._held.close()


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
        """Sends a point of each chart."""
        self._run.log({"step": step, **_tags(group, scalars, layers)})

    def close(self):
        """Uploads what is left."""
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
