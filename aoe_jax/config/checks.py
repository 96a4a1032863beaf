"""Checks of configuration fields. Each raises a `UserError` that names the field, its value and
what would be right.
"""

import dataclasses
import math

from aoe_jax.errors import UserError


def setting(
    default,
    *,
    above=None,
    at_least=None,
    below=None,
    at_most=None,
    choices=None,
    training_only=False,
):
    """A dataclass field with the values that it may have.

    Args:
      default: the default; None is always allowed where it is the default.
      above, at_least, below, at_most: bounds of a number.
      choices: the values that are allowed.
      training_only: whether the field only matters for training, not for what a trained model
        computes.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata |= {"choices": choices, "training_only": training_only}
    return dataclasses.field(default=default, metadata=metadata)


_BOUNDS = {
    "above": ("greater than {}", lambda value, bound: value > bound),
    "at_least": ("at least {}", lambda value, bound: value >= bound),
    "below": ("below {}", lambda value, bound: value < bound),
    "at_most": ("at most {}", lambda value, bound: value <= bound),
}


def check_settings(group_name, group):
    """Checks every field of a group that was declared with `setting`.

    Raises:
      UserError: a field has a value that it may not have.
    """
    for field in dataclasses.fields(group):
        name, value = f"{group_name}.{field.name}", getattr(group, field.name)
        allowed = field.metadata
        if allowed.get("choices"):
            require_choice(name, value, allowed["choices"])
        bounds = {kind: bound for kind, bound in allowed.items() if kind in _BOUNDS}
        if not bounds or (value is None and field.default is None):
            continue
        wanted = " and ".join(_BOUNDS[kind][0].format(bound) for kind, bound in bounds.items())
        is_right = all(_BOUNDS[kind][1](value, bound) for kind, bound in bounds.items())
        require(is_right and math.isfinite(value), name, value, f"must be {wanted}")


def require(condition, name, value, wanted):
    """Refuses a value of a field `GROUP.FIELD` unless the condition holds; `wanted` says what would
    be right.
    """
    if not condition:
        raise UserError(f"config.{name}={value!r}: {wanted}")


def require_choice(name, value, choices):
    """Refuses a value that is none of the choices."""
    require(value in choices, name, value, f"choose one of {', '.join(map(str, choices))}")


def require_flag(condition, name, value, wanted):
    """Refuses the value of a command-line flag unless the condition holds."""
    if not condition:
        raise UserError(f"--{name}={value}: {wanted}")
