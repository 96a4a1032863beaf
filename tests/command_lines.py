"""Finds the command lines in the documentation, and parses them without running them."""

import re
import runpy
import shlex
import sys

import pytest
from absl import flags
from markdown_it import MarkdownIt

from aoe_jax import cli
from tests.in_process import module_of, other_flags_hidden

_COMMAND = re.compile(r"\bpython (?:-m )?([\w.]+|\w+/\w+\.py)(?= |$|\")([^#|;\"]*)")
_MADE_FROM_FILES = re.compile(r"configs/finetune\.py.*|.*\.json")  # files that a user makes


def code_of(page):
    """Yields the lines of code in Markdown: blocks without a language, and inline code."""
    for token in MarkdownIt().enable("table").parse(page):
        if token.type == "code_block":
            yield from token.content.replace("\\\n", " ").splitlines()
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def commands_of(page):
    """Yields `(program, arguments)` of commands in Markdown, two for a supervised command."""
    for line in code_of(page):
        for program, arguments in _COMMAND.findall(line):
            own, _, supervised = arguments.partition(" -- ")
            yield program, own.strip()
            if supervised:
                program, _, arguments = supervised.partition(" ")
                yield program, arguments.strip()


def _values(arguments):
    """Splits a line into arguments; drops "..." and replaces placeholders by the number 1."""
    given = [argument for argument in shlex.split(arguments) if "..." not in argument]
    return [re.sub(r"=[A-Z]+$", "=1", argument) for argument in given]


def check(program, lines):
    """Parses lines of arguments with the flags of a program, and checks their configurations.
    Raises `UserError` if a line has a mistake.
    """
    with pytest.MonkeyPatch.context() as patch, other_flags_hidden():
        patch.setattr(cli, "run", lambda main: _parse(program, lines))
        patch.setattr("sys.argv", [program, *lines])  # it decides which flags are defined
        patch.delitem(sys.modules, module_of(program), raising=False)  # avoids a warning
        runpy.run_module(module_of(program), run_name="__main__")


def _parse(program, lines):
    for line in lines:
        cli._parse([program, *_values(line)])
        config = "config" in flags.FLAGS and flags.FLAGS.config
        is_complete = "routing.name=close.py" not in line  # the page says how to write close.py
        if config and is_complete and not _MADE_FROM_FILES.fullmatch(config):
            cli.parsed_config(flags.FLAGS["config"])
        for flag in flags.FLAGS:
            flags.FLAGS[flag].unparse()
