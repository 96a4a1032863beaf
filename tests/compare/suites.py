"""A suite of tiny runs on the texts of `tests.runs`, as a file that the command reads."""

import json

from tests.runs import settings

ROWS = """
import json
from aoe_jax.compare.suite import Arm, Size, Suite, Sweep
from aoe_jax.storage.config_files import default_config
from configs.compare.arms import aoe, moe

SETTINGS = json.loads('''{settings}''')


def get_suite():
    base = default_config()
    known = {{name: value for name, value in SETTINGS.items() if value is not None}}
    base.update_from_flattened_dict(known)
    elsewhere = {{"attention": "cudnn"}}  # CPUs cannot train it
    broken = Arm("broken", {{"experts": {{"kind": "router"}}, "model": elsewhere}})
    return Suite(
        name="tests",
        base=base,
        arms={{"moe": moe("aux"), "aoe": aoe(4, "aux"), "broken": broken}},
        **{{"sizes": {{"a": Size({{}}, seeds=2)}}}} | dict({more}),
        baseline="moe",
        routing_tokens=256,
    )
"""

SHORT = {
    "train__steps": 6,
    "train__eval_every": 3,
    "train__warmup": 0.2,
    "train__log_every": 1,
    "checkpoint__every": 2,
    "checkpoint__keep": 1,
    "checkpoint__keep_every": 2,
}


def write_suite(path, more="", **changes):
    """Writes the file; `more`: further arguments of `Suite`; `changes`: settings of all runs."""
    path.write_text(ROWS.format(settings=json.dumps(settings(**SHORT | changes)), more=more))
    return path
