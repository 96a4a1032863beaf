"""Looks at the runs of a size, or at a sweep, in a process of its own: `python -m aoe_jax.compare.measure --todo=FILE`.

The JSON file says what to do. Of a size: `routing`, directories of runs whose routing is looked at (`routing.py`) on
`tokens` tokens; and `steps`, runs by name, each `config` and `folder`, whose steps are timed (`step_times.py`) into the file
`output`. Of a sweep: `points`, which are measured (`throughput.py`) into `output`, and whether its values are those of a
`topology`.
"""

import logging
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.config import Config
from aoe_jax.json_files import read_json
from aoe_jax.stopping import StopRequests

log = logging.getLogger("aoe_jax.compare.measure")  # not __name__, which is __main__ on the command line

_TODO = flags.DEFINE_string("todo", None, "a JSON file of what to do")


def main():
    """Measures; exit status 1 where the routing of a run couldn't be looked at."""
    StopRequests("the same command does what is left").listen()
    todo = read_json(Path(cli.required(_TODO)))
    if "points" not in todo:
        return _measure_size(todo)
    from aoe_jax.compare.throughput import measure_points

    measure_points(todo["points"], todo["topology"], Path(todo["output"]))
    return 0


def _measure_size(todo):
    failed = None
    from aoe_jax.compare.routing import analyse
    from aoe_jax.compare.step_times import time_steps

    for folder in todo["routing"]:
        try:
            analyse(Path(folder), todo["tokens"])
            log.info("routing of %s", folder)
        except Exception as e:  # of one run; the others are looked at all the same
            log.exception("routing of %s", folder)
            failed = f"routing of {folder}: {type(e).__name__}: {e}"
    if todo["steps"]:
        trained = {
            arm: (Config.from_config_dict(run["config"]), Path(run["folder"])) for arm, run in todo["steps"].items()
        }
        for arm, seconds in time_steps(trained, Path(todo["output"])).items():
            log.info("%s: %.4f s a step", arm, seconds)
    if failed:
        log.error("%s", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
