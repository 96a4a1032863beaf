"""Trains a model, or continues a run.

    python train.py --config=FILE[:VARIANT] --workdir=DIR [--config.train.steps=N ...]

The same command continues a run that has stopped for any reason. The command writes checkpoints,
`metrics.jsonl`, `summary.json` and the picture `training.png` to `--workdir`.
"""

import shlex
from importlib import import_module

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.config.checks import require_flag
from aoe_jax.storage.paths import is_remote, parsed_path
from aoe_jax.training.stopping import StopRequests

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "the directory of the run; if it has checkpoints, the run continues"
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "STEP:N, trace N steps, beginning with step STEP, into WORKDIR/profile"
)
_WANDB = flags.DEFINE_string(
    "wandb", None, "a project of Weights & Biases that receives the metrics too"
)
_START_OVER = flags.DEFINE_bool(
    "start-over", False, "begin anew; the files of the run in WORKDIR are moved to its set_aside/"
)
_GO_BACK = flags.DEFINE_integer(
    "go-back", None, "continue from the checkpoint of this step; newer files move to set_aside/", 1
)
_BRANCH = flags.DEFINE_string(
    "branch", None, "DIR@STEP, begin a new run from that checkpoint of the run in DIR"
)


def main():
    stop = StopRequests()
    stop.listen()
    config = cli.parsed_config(_CONFIG)
    workdir = cli.path_of(_WORKDIR, in_store=True)
    profile, project = range(0), _WANDB.value
    if _PROFILE.value is not None:
        from aoe_jax.training.profile import steps_to_trace

        profile = steps_to_trace(_PROFILE.value, config.train.steps)
    if project is not None:
        require_flag(project, "wandb", project, "name a project")
        import_module("wandb")  # a missing package is refused early
    wanted = "give it without --start-over"
    require_flag(not _START_OVER.value or _GO_BACK.value is None, "go-back", _GO_BACK.value, wanted)
    branch = None
    if _BRANCH.value is not None:
        source, _, step = _BRANCH.value.rpartition("@")
        wanted = "write it as DIR@STEP, such as runs/long@2000"
        require_flag(source and step.isdecimal(), "branch", _BRANCH.value, wanted)
        branch = parsed_path(source, "--branch"), int(step)
        cli.refuse("leave it out with --branch", _START_OVER, _GO_BACK)
        require_flag(not is_remote(workdir), "branch", _BRANCH.value, "needs a --workdir on a disk")
    distributed.start()
    from aoe_jax.evaluation.generation import text_sampler
    from aoe_jax.training.loop import train  # JAX may start only after `distributed.start`

    start = {"start_over": _START_OVER.value, "go_back": _GO_BACK.value, "branch": branch}
    summary = train(config, workdir, stop, profile, project, text_sampler=text_sampler, **start)
    import jax

    if jax.process_index() == 0:
        print(_closing_words(workdir, summary))


def _closing_words(workdir, summary):
    """Text for the end of a run: its result, its files, and commands to use the model."""
    from aoe_jax.training.metrics import in_words

    folder = shlex.quote(str(workdir))
    lines = {
        "result": in_words(summary),
        "picture": workdir / "training.png",
        "files": f"{folder}: summary.json, metrics.jsonl, checkpoints, tensorboard",
        "evaluate": f"python -m aoe_jax.eval --workdir={folder}",
        "generate": f"python -m aoe_jax.generate --workdir={folder} --prompt='We the people'",
    }
    return "\n".join(f"{name:<9} {line}" for name, line in lines.items())


command = cli.command(main)
