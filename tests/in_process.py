"""Runs a command in the process of the test."""

import contextlib
import importlib
import io
import logging
import sys
from unittest import mock

from absl import flags
from absl import logging as absl_logging

from aoe_jax import cli
from aoe_jax.storage import retry
from tests.runs import ROOT


def execute(command):
    """Runs a command line of Python, such as `["train.py", ...]`: `(status, stdout, stderr)`."""
    program, *arguments = command
    name = arguments.pop(0) if program == "-m" else program
    files = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        mock.patch.object(sys, "argv", command),  # it decides which flags are defined
        fresh(name) as module,
        logging_restored(),
        contextlib.redirect_stdout(files[0]),
        contextlib.redirect_stderr(files[1]),
        contextlib.chdir(ROOT),
    ):
        status, _ = cli.execute(module.main, [program, *arguments])
    return status, *(file.buffer.getvalue().decode() for file in files)


def module_of(program):
    """The module of a command, such as `train.py` or `aoe_jax.plan`."""
    return f"aoe_jax.{program.removesuffix('.py')}" if program.endswith(".py") else program


@contextlib.contextmanager
def fresh(program):
    """Imports the module of a command again, with its flags."""
    name = module_of(program)
    name += ".__main__" if name in ("aoe_jax", "aoe_jax.compare") else ""
    before = sys.modules.pop(name, None)
    with other_flags_hidden():
        try:
            yield importlib.import_module(name)
        finally:
            sys.modules.pop(name, None)
            if before:
                sys.modules[name] = before


@contextlib.contextmanager
def other_flags_hidden():
    """A context in which a command may define flags that other commands have defined before."""
    known = {flag: flags.FLAGS[flag] for flag in flags.FLAGS}
    overridable = {flag: held.allow_override for flag, held in known.items()}
    for held in known.values():
        held.allow_override = True
    try:
        yield
    finally:
        for flag in list(flags.FLAGS):
            if flags.FLAGS[flag] is not known.get(flag):
                delattr(flags.FLAGS, flag)
        for flag, held in known.items():
            if flag not in flags.FLAGS:
                flags.FLAGS[flag] = held
            held.allow_override = overridable[flag]
            held.unparse()


@contextlib.contextmanager
def logging_restored():
    logger, seconds = logging.getLogger("aoe_jax"), retry.retry_seconds
    before = logger.handlers[:], logger.level, logger.propagate
    verbosity, asynchronous = absl_logging.get_verbosity(), logging.getLogger("asyncio").level
    hook = sys.unraisablehook
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        logger.setLevel(logger.level)
        absl_logging.set_verbosity(verbosity)
        sys.unraisablehook = hook
        logging.getLogger("asyncio").setLevel(asynchronous)
        retry.retry_seconds = seconds


def call(module, *arguments):
    """Parses a command line with the flags of a command's module, and returns what its `main`
    returns. Raises the exceptions of which the command would print a line.
    """
    argv = [module, *arguments]
    with mock.patch.object(sys, "argv", argv), fresh(module) as command, logging_restored():
        cli._parse(argv)
        return command.main()
