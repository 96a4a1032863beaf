"""Where the figures of a run go: `metrics.jsonl`, TensorBoard files and, by option, Weights &
Biases.

A writer's `write(step, group, scalars, layers, experts)` takes the figures of one step: `group` is
`train` or `validation`, `scalars` name -> number, `layers` name -> array `[L]`, `experts` name ->
array `[L, n]`, of which TensorBoard keeps the distribution over experts and the others nothing. L
layers, n experts.
"""

import json
import math
import os
import secrets
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json


@contextmanager
def _hidden(module):
    """Lets others find that a module is missing, unless it is imported already."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


# tensorboardX imports PyTorch where that is installed, for nothing that is used here: seconds at
# every start of a run.
with _hidden("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import histogram, image

BINS = 16  # of a histogram


class JsonLines:
    """One JSON object a line, which outlives the process at once, null for what isn't finite.

    Lines of steps after `start_step`, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, start_step, validated=True):
        """Opens the file for a run that goes on from `start_step`; `validated`: whether its
        validation is done.
        """
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _belongs(line, start_step, validated)]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, step, group, scalars, layers, experts):
        """A line of `step`, the scalars, and `layers` where there are any."""
        line = {"step": step} | {name: _or_null(value) for name, value in scalars.items()}
        if layers:
            line["layers"] = {name: _shortest(values) for name, values in layers.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self):
        """Waits until what is written outlives a power cut too."""
        os.fsync(self._file.fileno())

    def close(self):
        """Closes the file."""
        self._file.close()


def _shortest(values):
    """Numbers that read back as the same float32, with no more digits than that takes."""
    return [
        v if isinstance(v, int) else _or_null(float(str(np.float32(v)))) for v in values.tolist()
    ]


def _or_null(value):
    return value if math.isfinite(value) else None


def _belongs(line, start_step, validated):
    try:
        line = json.loads(line)
        return line["step"] < start_step + (validated or "validation_nll" not in line)
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return False


def _tags(group, scalars, layers):
    """All numbers by the names that charts have."""
    tags = {f"{group}/{name.removeprefix(group + '_')}": value for name, value in scalars.items()}
    for name, values in layers.items():
        tags |= {
            f"experts/{name}/layer_{layer}": value for layer, value in enumerate(values.tolist())
        }
    return tags


class TensorBoard:
    """Event files; what a run cut off left of later steps is hidden."""

    def __init__(self, folder: Path, start_step):
        """Opens a file for a run that goes on from `start_step`."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not tensorboardX's SummaryWriter: its queue is lost when the process is killed.
        self._events = EventsWriter(str(folder / "events"))
        self._add(start_step + 1, file_version="brain.Event:2")
        self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()

    def write(self, step, group, scalars, layers, experts):
        """A point in each chart and a histogram for each layer, all as one event: one by one they
        take ten times as long.
        """
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in _tags(group, scalars, layers).items()
        ]
        for name, of_layers in experts.items():
            for layer, of_experts in enumerate(of_layers):
                if np.isfinite(of_experts).all():  # there are no bins for others
                    values += histogram(
                        f"histograms/{name}/layer_{layer}", of_experts, bins=BINS
                    ).value
        self._add(step, summary=Summary(value=values))

    def draw(self, step, name, figure):
        """A picture of a matplotlib `Figure`; it takes a tenth of a second or more."""
        from matplotlib.backends.backend_agg import (
            FigureCanvasAgg,
        )  # half a second, which a dense model saves

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._add(
            step, summary=image(name, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC")
        )

    def sync(self):
        """Does nothing: every event is handed over at once."""

    def close(self):
        """Closes the file, once."""
        if self._events:
            self._events.close()
        self._events = None


class Wandb:
    """A run at Weights & Biases; a run that goes on in its workdir goes on there, under the id in
    `wandb.json`.

    Points come by their number `step`. What a run cut off sent of later steps comes again, with the
    same values.
    """

    def __init__(self, workdir: Path, project, config):
        """Begins or goes on with the run; `config` is a nested dict.

        Raises:
          UserError: see `check_wandb`, or Weights & Biases refuses, such as without a login.
        """
        check_wandb(workdir, project)
        import wandb  # nobody who doesn't ask for it needs it

        identity = workdir / "wandb.json"
        if not identity.exists():
            write_json(identity, {"project": project, "id": secrets.token_hex(4)})
        settings = wandb.Settings(console="off")  # stdout and stderr stay as they are
        try:
            self._run = wandb.init(
                project=project,
                id=read_json(identity)["id"],
                resume="allow",
                name=workdir.absolute().name,
                dir=str(workdir),
                config=config,
                settings=settings,
            )
        except wandb.Error as e:
            raise UserError(
                f"--wandb={project}: {' '.join(str(e).split())[:200]}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from e
        self._run.define_metric("*", step_metric="step")

    def write(self, step, group, scalars, layers, experts):
        """A point in each chart."""
        self._run.log({"step": step, **_tags(group, scalars, layers)})

    def sync(self):
        """Does nothing: what is lost is sent again."""

    def close(self):
        """Sends what is left, and ends the run."""
        self._run.finish()


def check_wandb(workdir: Path, project):
    """Checks that `--wandb=PROJECT` can be done; writes nothing.

    Raises:
      UserError: no project or no package, or the run in `workdir` belongs to another project.
    """
    if not project:
        raise UserError("--wandb=: name a project")
    identity = workdir / "wandb.json"
    found = read_json(identity).get("project") if identity.exists() else project
    if found != project:
        raise UserError(
            f"--wandb={project}: the run in {workdir} belongs to project {found}; give that, or no --wandb"
        )
    try:
        import wandb  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"--wandb={project}: the package {e.name} is missing; pip install 'aoe_jax[wandb]'"
        ) from e
