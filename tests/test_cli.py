"""How commands parse their flags and how they end; other tests run every command."""

import errno
import os
import subprocess
import sys

import pytest
from gcsfs.retry import HttpError
from jax.errors import JaxRuntimeError

from aoe_jax import cli
from aoe_jax.errors import Interrupted, MachineFault, Preempted, Terminated, UserError
from tests.in_process import logging_restored
from tests.runs import ROOT


@pytest.mark.parametrize("value", ["-" * 100_000 + "1", "not " * 50_000 + "1", "a"])
def test_tuples_that_are_no_tuples(value):
    with pytest.raises(ValueError):
        cli._FieldParser(tuple, has_none=False).parse(value)


def noted(error):
    error.add_note("--------------------\nFor simplicity, JAX has removed its internal frames")
    error.add_note("the same command goes on\nand more")
    return error


FULL = "No space left on device"
FILLED = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."
ENDS = {  # exception -> exit status, last line on stderr, has a traceback, ends in order
    "a mistake": (UserError("bad"), 2, "error: bad", False, False),
    "of the disk": (OSError(errno.EIO, "I/O error"), 5, "error: [Errno 5] I/O", False, False),
    "a full disk": (OSError(errno.ENOSPC, FULL), 5, f"error: [Errno 28] {FULL}", False, False),
    "of a store": (HttpError({"code": 503, "message": "later"}), 5, "error: later", False, False),
    "of memory": (MemoryError(), 5, "error: MemoryError", False, False),
    "of any library": (RuntimeError(f"failed: {FULL}"), 5, "error: failed: No sp", True, False),
    "of a missing file": (FileNotFoundError("x"), 1, "failed: FileNotFoundError: x", True, False),
    "of JAX": (JaxRuntimeError("UNAVAILABLE: x"), 1, "failed: JaxRuntimeError: U", True, False),
    "a fault with notes": (
        noted(OSError(errno.EIO, "broken")),
        *(5, "error: [Errno 5] broken; the same command goes on", False, False),
    ),
    "a fault that was retried": (
        noted(MachineFault("gone")),
        *(5, "error: gone; the same command goes on", False, False),
    ),
    "a device's memory": (
        JaxRuntimeError(FILLED),
        *(2, "error: the memory of a device is exhausted (", False, False),
    ),
    "a pipe": (BrokenPipeError(), 141, "error: nobody reads the output", False, False),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted", False, False),
    "SIGTERM": (Terminated("terminated"), 143, "terminated", False, False),
    "a preemption": (Preempted("saved"), 0, "saved", False, True),
    "Ctrl-C while training": (Interrupted("saved"), 130, "saved", False, True),
}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_how_exceptions_end_a_command(name, debug, capfd):
    error, status, words, has_traceback, is_orderly = ENDS[name]

    def main():
        raise error

    with logging_restored():
        argv = ["command", *(["--debug"] if debug else [])]
        assert cli.execute(main, argv) == (status, is_orderly)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith(words) and "and more" not in lines[-1]
    shows = has_traceback or (debug and isinstance(error, Exception))
    assert any("Traceback" in line for line in lines) == shows


@pytest.mark.parametrize(
    ("flag", "words"), [("config", "raise train.accumulate"), ("mesh", "such as --mesh=fsdp=4")]
)
def test_a_device_without_enough_memory(flag, words, monkeypatch):
    monkeypatch.setattr(cli, "FLAGS", {flag: None})
    assert words in cli._end_of(JaxRuntimeError(FILLED))[1]


# Prints; half a model is written when SIGTERM comes, and a second one follows.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from aoe_jax import cli
from aoe_jax.formats.writing import new_directory
what, output = sys.argv.pop(), sys.argv.pop()
def main():
    if what == "print":
        print("r\\u00e9sum\\u00e9 \\U0001F680")
        return 3
    with new_directory(Path(output)) as partial:
        (partial / "weights").write_text("half")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
cli.run(main)
"""


@pytest.mark.parametrize(
    ("what", "redirection", "status", "stdout", "stderr"),
    [
        ("print", "", 3, "r\\xe9sum\\xe9 \\U0001f680\n", ""),
        ("print", ">/dev/full", 5, "", f"error: [Errno 28] {FULL}\n"),
        ("print", "| true", 141, "", "error: nobody reads the output any more\n"),
        ("write", "", 143, "", "terminated\n"),
    ],
    ids=["ASCII", "a full disk", "a pipe that nobody reads", "SIGTERM"],
)
def test_processes(what, redirection, status, stdout, stderr, tmp_path):
    script = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    command = [
        "bash",
        "-c",
        script,
        "bash",
        sys.executable,
        "-c",
        PROGRAM,
        tmp_path / "model",
        what,
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)
    assert not list(tmp_path.iterdir())


THREAD = """
#include <pthread.h>
#include <stdlib.h>
static void die(void *unused) { abort(); }
static void *work(void *call) {
  pthread_cleanup_push(die, 0);  // like a C++ destructor, which must not be left by an exception
  while (1) ((void (*)())call)();
  pthread_cleanup_pop(0);
}
void start(void *call) {
  pthread_t thread;
  pthread_create(&thread, 0, work, call);
}
"""
CALLED = """
import atexit, ctypes, sys, time
from aoe_jax import cli
library, call = sys.argv.pop(), ctypes.CFUNCTYPE(None)(lambda: time.sleep(0.001))
def main():
    ctypes.CDLL(library).start(call)
    atexit.register(print, "bye", end="", flush=True)
cli.run(main)
"""


def test_a_thread_of_a_library_that_calls_python_at_the_end(tmp_path):
    source, library = tmp_path / "thread.c", tmp_path / "thread.so"
    source.write_text(THREAD)
    compiler = ["cc", "-shared", "-fPIC", "-w", "-o", library, source, "-lpthread"]
    subprocess.run(compiler, check=True)
    program = [sys.executable, "-c", CALLED, library]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "bye"), done.stderr
