"""How commands end if what they print cannot be written, in processes of their own."""

import os
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


def test_debug_changes_no_exit_status():
    program = [sys.executable, "-c", PROGRAM.format(call=NEEDED), "--debug"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Exception ignored" not in done.stderr


def test_characters_that_the_encoding_lacks():
    program = [sys.executable, "-c", PROGRAM.format(call=NEEDED)]
    environment = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "r\\xe9sum\\xe9 \\U0001f680\n", done.stderr


def test_a_working_directory_that_was_deleted(tmp_path):
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    command = ["bash", "-c", script, "bash", tmp_path, sys.executable, "-m", "aoe_jax.train"]
    command += [f"--config={ROOT}/configs/tiny.py", "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = "error: the working directory has been deleted; change to another one"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == last, done.stderr
    assert "Traceback" not in done.stderr


FILLED = """
import jax, jax.numpy as jnp
from aoe_jax import cli
cli.define_{flag}_flag()
def main():
    jax.block_until_ready({compute})
main.__module__ = "aoe_jax.cli"
cli.run(main)
"""
ALLOCATIONS = {
    "an array": "jnp.ones(2**45)",
    "arrays of a program": "jax.jit(lambda: jnp.sort(jnp.arange(2**45, dtype=jnp.int8)))()",
}


@pytest.mark.parametrize("compute", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
@pytest.mark.parametrize(
    ("flag", "words"), [("config", "raise train.accumulate"), ("mesh", "such as --mesh=fsdp=4")]
)
def test_device_without_enough_memory(flag, words, compute):
    program = [sys.executable, "-c", FILLED.format(flag=flag, compute=compute)]
    for more in ([], ["--debug"]):
        done = subprocess.run([*program, *more], cwd=ROOT, capture_output=True, text=True)
        *before, last = done.stderr.strip().splitlines()
        assert done.returncode == 2 and ("Traceback" in done.stderr) == bool(more), done.stderr
        assert last.startswith("error: the memory of a device is exhausted (") and words in last
        assert before == [] or more
