"""Configurations that are refused, as lines `GROUP.FIELD=VALUE; ... => MESSAGE`.

The error names the first field with its value, and then says what stands in MESSAGE. `=> START ...
MESSAGE` is for an error that begins otherwise. A name without a dot is a group without fields.
"""

import ast

import pytest

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError


def _value(text):
    try:
        return float("nan") if text == "nan" else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def groups_of(settings):
    """`{group: {field: value}}` of `GROUP.FIELD=VALUE; ...`."""
    groups = {}
    for setting in filter(None, settings.split("; ")):
        name, _, value = setting.partition("=")
        group, has_field, field = name.partition(".")
        fields = groups.setdefault(group, {})
        if has_field:
            fields[field] = _value(value)
    return groups


def check_refused(case):
    """Checks one line."""
    settings, _, wanted = case.partition(" => ")
    groups = groups_of(settings)
    start, has_start, message = wanted.rpartition(" ... ")
    if not has_start:
        group, fields = next(iter(groups.items()))
        field, value = next(iter(fields.items()))
        start = f"{group}.{field}={value!r}"
    with pytest.raises(UserError) as error:
        Config.from_config_dict(groups)
    assert str(error.value).startswith(f"config.{start}"), error.value
    assert message in str(error.value).removeprefix(f"config.{start}"), error.value
