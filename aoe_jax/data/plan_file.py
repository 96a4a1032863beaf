"""`plan.json` stores the settings and files of a preparation, and its units of work.

The units do not depend on the number of processes. The plan determines the store.
"""

from collections.abc import Mapping
from pathlib import Path

from aoe_jax.config.checks import require_flag
from aoe_jax.data.documents import pieces_of
from aoe_jax.data.token_store import PLAN_FILE
from aoe_jax.errors import UserError
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, Kind, read_json, write_json
from aoe_jax.storage.lease import NAME

_UNITS = 512  # wanted number of units of work; `_UNIT_BYTES` limits their size
_UNIT_BYTES = (2**22, 2**29)  # smallest and largest size of a unit, in bytes of the input
_PLAN_BYTES = 2**28  # size limit of plan.json, enough for two million files
NEW_FOLDER = "Delete the folder, or use another --output"


def _is_state(value):
    is_list = isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)
    return is_list and all(map(NUMBER.holds, value[1:]))


_PLAN = {
    "tokenizer": TEXT,
    "text_field": TEXT,
    "validation": NUMBER,
    "test": NUMBER,
    "files": [Kind("a file's path, size and version", _is_state)],
    "units": [{"size": COUNT, "pieces": [[COUNT]]}],  # piece: index in `files`, start, stop
}


def make_plan(files: Mapping, planned: dict) -> dict:
    """Returns the content of `plan.json`, which determines the store: the fields of `planned`,
    `files` as `[path, size, version]`, and `units` of work with pieces `[file index, start, stop]`.
    """
    states = [[str(path), *state] for path, state in files.items()]
    smallest, largest = _UNIT_BYTES
    unit_bytes = min(max(sum(size for _, size, _ in states) // _UNITS, smallest), largest)
    units = []
    for number, (path, (n_bytes, _)) in enumerate(files.items()):
        for piece, size in pieces_of(path, n_bytes, unit_bytes):
            if not units or units[-1]["size"] >= unit_bytes:
                units.append({"size": 0, "pieces": []})
            units[-1]["size"] += size
            units[-1]["pieces"].append([number, piece.start, piece.stop])
    return planned | {"files": states, "units": units}


def read_plan(output: Path) -> dict:
    """Reads `plan.json` of a store. Raises `UserError` if it is damaged."""
    plan = read_json(output / PLAN_FILE, NEW_FOLDER, _PLAN, _PLAN_BYTES)
    for unit in plan["units"]:
        pieces = unit["pieces"]
        is_whole = pieces and all(len(p) == 3 and p[0] < len(plan["files"]) for p in pieces)
        wanted = f"its {PLAN_FILE} is damaged. {NEW_FOLDER}"
        require_flag(is_whole, "output", output, wanted)
    return plan


def claimed_plan(files: Mapping, planned: dict, output: Path) -> dict:
    """Returns the plan of `output`, written first if it is missing. Raises `UserError` if settings
    or files have changed.
    """
    if not (output / PLAN_FILE).exists():
        left = (NAME, f"{PLAN_FILE}.")  # a killed process may leave a partial plan
        is_empty = all(path.name.startswith(left) for path in output.iterdir())
        wanted = "is not empty, and holds no preparation; use another --output"
        require_flag(is_empty, "output", output, wanted)
        write_json(output / PLAN_FILE, make_plan(files, planned), indent=None)
    plan = read_plan(output)
    for name, here in planned.items():
        other = f"holds a preparation of something else: {name} is {plan[name]!r} there, {here!r}"
        require_flag(plan[name] == here, "output", output, f"{other} here. {NEW_FOLDER}")
    before = {path: state for path, *state in plan["files"]}
    now = {str(path): [*state] for path, state in files.items()}
    for path in before | now:
        if before.get(path) != now.get(path):
            changed = f"{path} is new, gone or changed since the preparation began"
            raise UserError(f"--input: {changed}. {NEW_FOLDER}")
    return plan
