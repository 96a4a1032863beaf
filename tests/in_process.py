"""Runs commands in the process of the tests, for what needs no process: wrong inputs above all."""

import importlib.util

from absl import flags

from aoe_jax import cli, distributed  # noqa: F401  defines flags that stay


def call(module, *arguments):
    """Parses a command line with the flags of a command's module, and returns what its `main`
    returns. Raises what the command would print as its last line.
    """
    known, spec = {*flags.FLAGS}, importlib.util.find_spec(module)
    command = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(command)
        cli._parse([module, *arguments])
        return command.main()
    finally:
        for name in {*flags.FLAGS} - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
