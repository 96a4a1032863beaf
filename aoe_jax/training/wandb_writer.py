"""Sends the metrics of a run to Weights & Biases."""

import html
import re
import secrets
from pathlib import Path

import wandb

from aoe_jax.errors import UserError
from aoe_jax.storage.files import TEXT, read_json, write_json
from aoe_jax.training.writers import tags


class Wandb:
    """A run at Weights & Biases. `wandb.json` stores its id, so a continued run keeps the id.

    Raises `UserError` if Weights & Biases refuses the run, for example without a login, and
    `ConnectionError` if it cannot be reached. After a kill, the next start sends some steps again.
    """

    name = "wandb"

    def __init__(self, workdir: Path, project, config):
        file = workdir / "wandb.json"
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(4)})
        try:
            self._run = wandb.init(
                project=project,
                id=read_json(file, schema={"id": TEXT})["id"],
                resume="allow",
                name=workdir.absolute().name,
                dir=str(workdir),
                config=config,
                # wandb must not capture stdout. After the timeout, `wandb sync` can send the rest.
                settings=wandb.Settings(console="off", finish_timeout=60.0),
            )
        except wandb.Error as e:
            reason = " ".join(str(e).split())[:200]
            refused = wandb.errors.AuthenticationError | wandb.errors.UsageError
            if isinstance(e, refused) or re.search(r"error 4\d\d", reason):
                cure = "log in with `wandb login`, or set WANDB_MODE=offline"
                raise UserError(f"--wandb={project}: {reason}; {cure}") from e
            raise ConnectionError(reason) from e
        self._run.define_metric("*", step_metric="step")

    def write(self, step, group, scalars, layers, experts):
        self._run.log({"step": step, **tags(group, scalars, layers)})

    def write_text(self, step, text):
        shown = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": step, "sample": shown})

    def close(self):
        self._run.finish()
