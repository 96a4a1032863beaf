"""Checks the directory of a run: its configuration, data and checkpoints."""

import logging
import time
from pathlib import Path

from flax.traverse_util import flatten_dict

from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import TokenisedCorpus
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import differences
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import (
    COUNT,
    NUMBER,
    TEXT,
    or_none,
    read_json,
    read_metrics,
    write_json,
    write_whole,
)
from aoe_jax.storage.paths import move, unused
from aoe_jax.training.checkpoint import DAMAGED, Checkpoints

log = logging.getLogger(__name__)

_IDENTITY = ("config.json", "data.json")  # which run it is
# The files of a run, except its tokenizer. Checkpoints come before the files that record them, so
# that a move that was interrupted never leaves a run that seems whole.
_FILES = (
    *("checkpoints", DAMAGED, "tensorboard", "profile", "wandb", "hang", "eval.json", "load.png"),
    *("training.png", "wandb.json", "summary.json", "metrics.jsonl", "heartbeat.json"),
    *_IDENTITY,
)

# Groups and fields that may change when a run continues: they do not affect what a step computes.
FREE = {
    "checkpoint",
    "mesh",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "train.hang_timeout",
    "train.repeat_every",
    "data.cache",
    "data.path",
    "data.tokenizer",  # `check_data` compares its content
    "model.attention",
    "experts.grouped_matmul",
    "model.unroll",
}


def _fixed(config):
    """The values by field that a run keeps; without the paths of corpora, which may move."""
    groups = config.to_dict()
    groups["data"] |= {"name": config.data.name_without_paths}
    fields = flatten_dict(groups, sep=".").items()
    return {name: value for name, value in fields if not {name.partition(".")[0], name} & FREE}


def check_workdir(workdir: Path, config: Config, has_begun=True):
    """Raises `UserError` if `workdir` holds a model, or a run of another configuration that
    `has_begun`: one that has computed nothing may change its configuration.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    differing = differences(_fixed(read_run_config(path)), _fixed(config)).values()
    if has_begun and differing:
        raise UserError(
            f"workdir {workdir} holds another configuration: {'; '.join(differing)}. Use another "
            "--workdir, or --start-over"
        )


def check_history(workdir: Path, steps):
    """Checks that the files of a run show no checkpoint beyond `steps`, those of all complete ones;
    one that was set aside as damaged is not missing. Raises `UserError` if a later checkpoint was
    complete, there are figures and nothing else, or nothing says of which run the checkpoints are.
    """
    if steps and (missing := [n for n in _IDENTITY if not (workdir / n).exists()]):
        raise UserError(
            f"--workdir={workdir} has checkpoints but no {missing[0]}, so they may be of another "
            "run. Bring it back; or --start-over begins anew, and moves them to set_aside/"
        )
    newest, saved, problem = max(steps, default=0), read_heartbeat(workdir)["saved"], None
    damaged = workdir / DAMAGED
    names = [path.name.partition("-")[0] for path in damaged.iterdir()] if damaged.is_dir() else []

    def is_missing(step):  # and not because it was damaged, while an older one is there
        return step > newest and not (steps and str(step) in names)

    if saved is not None and is_missing(saved):
        problem = f"heartbeat.json shows that a checkpoint of step {saved} was complete"
    if (summary := workdir / "summary.json").exists():
        step = read_json(summary, schema={"metrics": {"step": COUNT}})["metrics"]["step"]
        if is_missing(step):
            problem = f"summary.json shows that a checkpoint of step {step} was complete"
    lines = read_metrics(workdir / "metrics.jsonl")
    if not steps and saved is None and (line := next(lines, None)):
        problem = f"metrics.jsonl begins with step {line['step']}"
    if problem:
        there = f"the newest checkpoint is of step {newest}" if newest else "checkpoints/ has none"
        goes_back = f"--go-back={newest} continues from that, and " if newest else ""
        raise UserError(
            f"--workdir={workdir}: {problem}, but {there}. Bring the missing ones back; or "
            f"{goes_back}--start-over begins anew. Newer files are then moved to set_aside/"
        )


def read_heartbeat(workdir: Path):
    """`saved`, `began` and `history` of a run's heartbeat, None where it has no such file."""
    path = workdir / "heartbeat.json"
    schema = {"saved": or_none(COUNT), "began": or_none(NUMBER), "history": or_none(COUNT)}
    content = read_json(path, schema=schema) if path.exists() else {}
    return {name: content.get(name) for name in schema}


def set_aside(workdir: Path, go_back: int | None = None):
    """Moves the files of a run to a new folder in `workdir/set_aside`; with `go_back`, only what is
    newer than the checkpoint of that step. Raises `UserError` if there is no such checkpoint.
    """
    names, metrics = list(_FILES), workdir / "metrics.jsonl"
    if go_back is not None:
        steps = Checkpoints(workdir).steps()
        if go_back not in steps:
            raise UserError(
                f"--go-back={go_back}: {workdir} has checkpoints of steps "
                f"{', '.join(map(str, steps)) or 'none'}; give one of these steps"
            )
        if metrics.exists():
            metrics.with_name("metrics.jsonl.whole").write_bytes(metrics.read_bytes())
        names = [f"checkpoints/{step}" for step in reversed(steps) if step > go_back]
        names += ["metrics.jsonl.whole", "summary.json", "training.png"]
    folder = folder_aside(workdir)
    moved = [name for name in names if (workdir / name).exists()]
    for name in moved:
        move(workdir / name, folder / name)
    if go_back is not None:  # last, so that no run goes on after moves that were interrupted
        heartbeat = read_heartbeat(workdir) | {"saved": go_back, "history": None}
        write_json(workdir / "heartbeat.json", heartbeat)
    if moved:
        log.info(f"moved {', '.join(sorted(moved))} to {folder}")


def folder_aside(workdir: Path) -> Path:
    """The path of a folder in `workdir/set_aside` that does not exist yet."""
    # A clock that was set back gives the same name twice.
    return unused(workdir / "set_aside" / time.strftime("%Y-%m-%d_%H-%M-%S"))


def check_data(workdir: Path, corpus: TokenisedCorpus):
    """Raises `UserError` if a text or the tokenizer has changed since the run began."""
    found = read_identities(workdir) or corpus.identities
    if found != corpus.identities:
        there, here = (
            ", ".join(stores or ["none"])[:1000] for stores in (found, corpus.identities)
        )
        raise UserError(
            f"workdir {workdir} was trained on token store {there}, this is {here}: the text or "
            "the tokenizer has changed. Bring the old text back (data.path, or the paths in "
            "data.name), or use another --workdir"
        )


def read_identities(workdir: Path) -> list[str]:
    """The identities of the corpora of a run or of a model of a run; empty if it has no file."""
    path = workdir / "data.json"
    if not path.exists():
        return []
    return read_json(path, schema={"token_stores": [TEXT]})["token_stores"]


def claim_workdir(workdir: Path, config: Config, corpus: TokenisedCorpus):
    """Writes `config.json`, `data.json` and a copy of the tokenizer, and removes `summary.json`;
    call it after all checks.
    """
    write_whole(workdir / corpus.tokenizer.name, corpus.tokenizer.read_bytes())
    write_json(workdir / "data.json", {"token_stores": corpus.identities})
    write_json(workdir / "config.json", config.to_dict())
    (workdir / "summary.json").unlink(missing_ok=True)
