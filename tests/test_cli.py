"""How commands end if what they print cannot be written, in processes of their own."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

PROGRAM = """
import sys
from aoe_jax import cli
def main():
    {call}('r\\u00e9sum\\u00e9 \\U0001F680')
main.__module__ = 'aoe_jax.cli'
cli.run(main)
"""
NEEDED, EXTRA = "print", "cli.print_if_possible"
CASES = {  # call, redirection -> exit status, last words on stderr
    "a full disk": (NEEDED, ">/dev/full", 5, "No space left on device"),
    "a full disk at the end of training": (EXTRA, ">/dev/full", 0, "cannot be printed"),
    "a pipe that nobody reads": (NEEDED, "| true", 141, "nobody reads the output any more"),
    "the same at the end of training": (EXTRA, "| true", 0, "cannot be printed (Broken pipe)"),
    "stdout is closed": (NEEDED, ">&-", 0, ""),
    "all are closed": (EXTRA, ">&- 2>&- <&-", 0, ""),
    "a log that nobody reads": (EXTRA, "2>&1 >/dev/full | true", 0, ""),
}


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_output_that_cannot_be_written(name, buffered):
    call, redirection, status, words = CASES[name]
    script = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    flags = [] if buffered else ["-u"]
    program = [sys.executable, *flags, "-c", PROGRAM.format(call=call)]
    command = ["bash", "-c", script, "bash", *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_characters_that_the_encoding_lacks():
    program = [sys.executable, "-c", PROGRAM.format(call=NEEDED)]
    environment = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "r\\xe9sum\\xe9 \\U0001f680\n", done.stderr
