"""Looks at the runs of a size, or at a sweep, in a process of its own: `python -m
aoe_jax.compare.measure --todo=FILE`.

The JSON file says what to do. Of a size: `routing`, directories of runs whose routing is looked at
(`routing.py`) on `tokens` tokens; and `steps`, runs by name, each `config` and `folder`, whose
steps are timed (`step_times.py`) into the file `output`. Of a sweep: `points`, which are measured
(`throughput.py`) into `output`, and whether its values are those of a `topology`.
"""

import logging
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.config import Config
from aoe_jax.json_files import read_json
from aoe_jax.stopping import StopRequests

log = logging.getLogger(
    "aoe_jax.compare.measure"
)  # not __name__, which is __main__ on the command line

_TODO = flags.DEFINE_string("todo", None, "a JSON file of what to do")


def main():
    """Measures; exit status 1 where something failed, which stops nothing else."""
    StopRequests("the same command does what is left").listen()
    todo = read_json(Path(cli.required(_TODO)))
    failed = _measure_sweep(todo) if "points" in todo else _measure_size(todo)
    for line in failed:
        log.error("%s", line)
    return 1 if failed else 0


def _measure_sweep(todo):
    from aoe_jax.compare.throughput import measure_points

    return measure_points(todo["points"], todo["topology"], Path(todo["output"]))


def _measure_size(todo):
    failed = []
    from aoe_jax.compare.routing import analyse
    from aoe_jax.compare.step_times import time_steps

    for folder in todo["routing"]:
        try:
            analyse(Path(folder), todo["tokens"])
            log.info("routing of %s", folder)
        except Exception as e:
            log.exception("routing of %s", folder)
            failed.append(f"routing of {folder}: {type(e).__name__}: {e}")
    if todo["steps"]:
        trained = {
            arm: (Config.from_config_dict(run["config"]), Path(run["folder"]))
            for arm, run in todo["steps"].items()
        }
        seconds, not_timed = time_steps(trained, Path(todo["output"]))
        for arm, value in seconds.items():
            log.info("%s: %.4f s a step", arm, value)
        failed += [f"steps of {arm}: {why}" for arm, why in not_timed.items()]
    return failed


if __name__ == "__main__":
    cli.run(main)
