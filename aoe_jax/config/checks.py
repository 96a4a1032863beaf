"""Checks of configuration fields: each raises a `UserError` that names the field, its value and
what would be right.
"""

import math

from aoe_jax.errors import UserError


def require(condition, name, value, wanted):
    """Refuses a value of a field `GROUP.FIELD` unless the condition holds; `wanted` says what would
    be right.
    """
    if not condition:
        raise UserError(f"config.{name}={value!r}: {wanted}")


def require_choice(name, value, choices):
    """Refuses a value that is none of the choices."""
    require(value in choices, name, value, f"choose one of {', '.join(map(str, choices))}")


def require_positive(group, config, *names):
    """Refuses fields of a group that aren't finite and greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{group}.{name}", value, "must be greater than 0")


def require_not_negative(group, config, *names):
    """Refuses fields of a group that aren't finite and at least 0."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{group}.{name}", value, "must be 0 or greater")
