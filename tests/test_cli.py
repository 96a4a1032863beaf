"""The command line that all commands share; other tests run it with every command."""

import os
import subprocess
import sys

import pytest

from aoe_jax import cli
from tests.runs import ROOT


@pytest.mark.parametrize("value", ["-" * 100_000 + "1", "not " * 50_000 + "1", "a"])
def test_tuples_that_are_no_tuples(value):
    with pytest.raises(ValueError):
        cli._FieldParser(tuple, has_none=False).parse(value)


def test_a_working_directory_that_was_deleted(tmp_path):
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    command = ["bash", "-c", script, "bash", tmp_path, sys.executable, "-m", "aoe_jax.train"]
    command += [f"--config={ROOT}/configs/tiny.py", "--workdir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = "error: the working directory has been deleted; change to another one"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == last, done.stderr
    assert "Traceback" not in done.stderr
