"""Where the figures of a run go: `metrics.jsonl`, TensorBoard files and, by option, Weights & Biases.

A writer's `write(step, group, scalars, layers)` takes the figures of one step: `group` is `train` or `validation`, `scalars`
name -> number, `layers` name -> array `[L]`, one number a layer. L layers, n experts.
"""

import importlib.util
import json
import os
import secrets
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from aoe_jax.errors import UserError
from aoe_jax.training.checkpoint import read_json, write_json


class JsonLines:
    """One JSON object a line, on disk at once; lines of steps after `start_step`, left by a run cut off, are dropped."""

    def __init__(self, path: Path, start_step):
        """Opens the file for a run that goes on from `start_step`."""
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, step, group, scalars, layers):
        """A line of `step`, the scalars, and `layers` where there are any."""
        line = {"step": step, **scalars}
        if layers:
            line["layers"] = {name: _shortest(values) for name, values in layers.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self):
        """Closes the file."""
        self._file.close()


def _shortest(values):
    """Numbers that read back as the same float32, with no more digits than that takes."""
    return [v if isinstance(v, int) else float(str(np.float32(v))) for v in values.tolist()]


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return float("inf")


def _tags(group, scalars, layers):
    """All numbers by the names that charts have."""
    tags = {f"{group}/{name.removeprefix(group + '_')}": value for name, value in scalars.items()}
    for name, values in layers.items():
        tags |= {f"experts/{name}/layer_{layer}": value for layer, value in enumerate(values.tolist())}
    return tags


class TensorBoard:
    """Event files; what a run cut off left of later steps is hidden."""

    def __init__(self, folder: Path, start_step):
        """Opens a file for a run that goes on from `start_step`."""
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step, group, scalars, layers):
        """A point in each chart."""
        for tag, value in _tags(group, scalars, layers).items():
            self._writer.add_scalar(tag, value, step)

    def draw_experts(self, step, statistics, title):
        """Histograms over the experts of each layer, of load and of mean norm or logit, and the heatmap of loads.

        It takes a tenth of a second or more.

        Args:
          step: of the run.
          statistics: `evaluation.load.load_statistics`.
          title: of the heatmap.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which a run without experts saves

        from aoe_jax.evaluation.load import draw_load_heatmap

        for name in ("load", "mean_norm", "mean_logit"):
            for layer, values in enumerate(statistics.get(name, [])):
                self._writer.add_histogram(f"experts/{name}/layer_{layer}", np.array(values), step)
        canvas = FigureCanvasAgg(draw_load_heatmap(statistics, title))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._writer.add_image("experts/load", pixels, step, dataformats="HWC")

    def close(self):
        """Flushes and closes the file."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases; a run that goes on in its workdir goes on there, under the id in `wandb.json`.

    Points come by their number `step`. What a run cut off sent of later steps comes again, with the same values.
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

    def write(self, step, group, scalars, layers):
        """A point in each chart."""
        self._run.log({"step": step, **_tags(group, scalars, layers)})

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
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb={project}: the package wandb is missing; pip install 'aoe_jax[wandb]'")
    identity = workdir / "wandb.json"
    found = read_json(identity).get("project") if identity.exists() else project
    if found != project:
        raise UserError(f"--wandb={project}: the run in {workdir} belongs to project {found}; give that, or no --wandb")
