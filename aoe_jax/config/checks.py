"""Checks of settings. A `UserError` names the field or flag, its value and the allowed values."""

import dataclasses
import difflib
import math
import numbers
import operator
import os
from typing import ClassVar

from aoe_jax.errors import UserError, shown

_BOUNDS = {
    "above": ("greater than {}", operator.gt),
    "at_least": ("at least {}", operator.ge),
    "below": ("below {}", operator.lt),
    "at_most": ("at most {}", operator.le),
    "divides": ("a divisor of {}", lambda value, other: other % value == 0),
    "multiple_of": ("a multiple of {}", lambda value, other: value % other == 0),
}


def setting(default, *, choices=None, kinds=None, training_only=False, **bounds):
    """Returns a dataclass field with its allowed values.

    Args:
      default: the default value; if it is None, the field may be None or a number in `bounds`.
      choices: all allowed values.
      kinds: values of `experts.kind` that use the field; other kinds require its default.
      training_only: whether the field affects only training, not the use of a trained model.
      **bounds: `NAME=LIMIT`, a key of `_BOUNDS`, and a number or the name of a field of the group.
    """
    metadata = {"choices": choices, "kinds": kinds, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata | {"training_only": training_only})


class Group:
    """The base class of configuration groups: frozen dataclasses that check their fields."""

    group: ClassVar[str]

    def __post_init__(self):
        """Checks the fields that `setting` declares; raises `UserError`."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices:
                require_choice(f"{self.group}.{field.name}", value, choices)
            bounds = field.metadata.get("bounds")
            if not bounds or (value is None and field.default is None):
                continue
            is_whole = field.type in (int, int | None)
            if not isinstance(value, numbers.Integral if is_whole else numbers.Real):
                self.refuse(field.name, f"must be a {'whole ' * is_whole}number")
            holds, wanted = math.isfinite(value), []
            for kind, bound in bounds.items():
                phrase, compare = _BOUNDS[kind]
                limit = getattr(self, bound) if isinstance(bound, str) else bound
                named = f"{self.group}.{bound}={limit}" if isinstance(bound, str) else bound
                holds = holds and compare(value, limit)
                wanted.append(phrase.format(named))
            if not holds:
                self.refuse(field.name, f"must be {' and '.join(wanted)}")

    def refuse(self, field, wanted):
        """Raises a `UserError` for a field; `wanted` describes the allowed values."""
        require(False, f"{self.group}.{field}", getattr(self, field), wanted)

    def make_absolute(self, field):
        """Makes the path in a field absolute; refuses an empty path and an unknown `~NAME`."""
        path = getattr(self, field)
        if path is not None:
            if not path.strip():
                self.refuse(field, "is empty; name a path")
            if os.path.expanduser(path).startswith("~"):
                self.refuse(field, "there is no such home directory; name it in full")
            object.__setattr__(self, field, absolute_path(path))

    def check(self, config):
        """Raises a `UserError` for values that do not fit the other groups of a `Config`."""


def require(condition, name, value, wanted):
    """Raises a `UserError` for a field `GROUP.FIELD` unless the condition is true."""
    if not condition:
        raise UserError(f"config.{name}={shown(value)}: {wanted}")


def misfit(value):
    """Returns "must be ..." if a number or a text from the user is invalid, else None."""
    if type(value) is int and abs(value) >= 2**31:
        return "must be smaller than 2**31"
    if type(value) is float and not math.isfinite(value):
        return "must be finite"
    if type(value) is str and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        return "must be UTF-8 without NUL"
    return None


def require_choice(name, value, choices):
    """Raises a `UserError` for a value that is not one of the choices."""
    require(value in choices, name, value, choose(value, choices))


def choose(wrong, choices):
    """Returns "choose one of ..." for the error message of a wrong choice."""
    return f"choose one of {', '.join(map(str, choices))}{did_you_mean(wrong, choices)}"


def did_you_mean(wrong, names):
    """Returns the end of an error message: the name that resembles a wrong one, or ""."""
    near = difflib.get_close_matches(str(wrong), map(str, names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def absolute_path(path):
    """The absolute path; a path in an object store, such as gs://BUCKET/FOLDER, stays as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def require_flag(condition, name, value, wanted):
    """Raises a `UserError` for a command-line flag unless the condition is true."""
    if not condition:
        raise UserError(f"--{name}={value}: {wanted}")


def differences(there, here):
    """Returns `{field: sentence}` for the fields that differ between two dicts `{field: value}`."""
    return {
        name: f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    }
