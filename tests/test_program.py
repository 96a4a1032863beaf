"""How commands end, and what they do with standard files, in processes of their own."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

PROGRAM = """
import sys
from aoe_jax import cli, program
def main():
    {call}('r\\u00e9sum\\u00e9 \\U0001F680')
main.__module__ = 'aoe_jax.cli'
cli.run(main)
"""
NEEDED, EXTRA = "print", "program.print_if_possible"
BAR = "from tqdm import tqdm; list(tqdm([1])); print"
CASES = {  # call, redirection -> exit status, last words on stderr
    "a full disk": (NEEDED, ">/dev/full", 5, "No space left on device"),
    "a full disk at the end of training": (EXTRA, ">/dev/full", 0, "cannot be printed"),
    "a pipe that nobody reads": (NEEDED, "| true", 141, "nobody reads the output any more"),
    "the same at the end of training": (EXTRA, "| true", 0, "cannot be printed (Broken pipe)"),
    "stdout is closed": (NEEDED, ">&-", 0, ""),
    "all are closed": (EXTRA, ">&- 2>&- <&-", 0, ""),
    "a log that nobody reads": (EXTRA, "2>&1 >/dev/full | true", 0, ""),
    "a log on a full disk": (BAR, "2>/dev/full", 0, ""),
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


CALLING = """
import subprocess, sys
from aoe_jax import cli
def main():
    return subprocess.call([sys.executable, "-c", "import os; [os.fstat(n) for n in range(3)]"])
main.__module__ = "aoe_jax.cli"
cli.run(main)
"""


def test_children_get_standard_files_that_were_closed():
    command = ["bash", "-c", '"$@" >&- 2>&- <&-', "bash", sys.executable, "-c", CALLING]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


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
    atexit.register(print, "bye", end="")
main.__module__ = "aoe_jax.cli"
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


STOPPED = """
import os, signal, threading, time
from aoe_jax import cli, stopping
def stop():
    time.sleep(0.5)  # the command has ended, and waits for this thread
    os.kill(os.getpid(), signal.SIGTERM)
def main():
    stopping.StopRequests().listen()
    threading.Thread(target=stop).start()
main.__module__ = "aoe_jax.cli"
cli.run(main)
"""


def test_a_signal_at_the_end_changes_no_status():
    program = [sys.executable, "-c", STOPPED]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


TERMINATED = """
import os, signal, time
from pathlib import Path
from aoe_jax import cli
from aoe_jax.formats.writing import new_directory
def main():
    with new_directory(Path({output!r})) as partial:
        (partial / "weights").write_text("half")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # one from the supervisor, one from the system
main.__module__ = "aoe_jax.cli"
cli.run(main)
"""


def test_a_terminated_command_removes_what_it_had_begun(tmp_path):
    program = [sys.executable, "-c", TERMINATED.format(output=str(tmp_path / "model"))]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "terminated\n")
    assert not list(tmp_path.iterdir())


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


RAISING = """
import errno, os
from aoe_jax import cli
{imports}
def main():
    raise {error}
main.__module__ = "aoe_jax.cli"
cli.run(main)
"""
ENDS = {  # imports, exception -> exit status, last line on stderr
    "of the disk": ("", "OSError(errno.EIO, os.strerror(errno.EIO))", 5, "error: [Errno 5] Input"),
    "of a store": (
        "from gcsfs.retry import HttpError",
        "HttpError({'code': 503, 'message': 'try later'})",
        5,
        "error: try later, 503",
    ),
    "of memory": ("", "MemoryError", 5, "error: MemoryError"),
    "of any library": (
        "",
        "RuntimeError('write() failed: No space left on device')",
        5,
        "error: write() failed: No space",
    ),
    "of a missing file": ("", "FileNotFoundError('x')", 1, "failed: FileNotFoundError: x"),
    "of JAX": (
        "from jax.errors import JaxRuntimeError",
        "JaxRuntimeError('UNAVAILABLE: a process is lost')",
        1,
        "failed: JaxRuntimeError: UNAVAILABLE",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_exceptions_of_libraries(name):
    """A fault needs no traceback if the system or a client of a store reports it."""
    imports, error, status, words = ENDS[name]
    program = [sys.executable, "-c", RAISING.format(imports=imports, error=error)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    has_traceback = name in ("of any library", "of a missing file", "of JAX")
    assert ("Traceback" in done.stderr) == has_traceback, done.stderr
    assert done.stderr.splitlines()[-1].startswith(words)


NOTED = """
def noted(error):
    error.add_note("--------------------\\nFor simplicity, JAX has removed its internal frames")
    error.add_note("the same command goes on\\nand more")
    return error
"""


def test_the_last_line_has_the_first_lines_of_notes():
    error = "noted(OSError(errno.EIO, 'broken'))"
    program = [sys.executable, "-c", RAISING.format(imports=NOTED, error=error)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    last = "error: [Errno 5] broken; the same command goes on"
    assert done.returncode == 5 and done.stderr.splitlines()[-1] == last, done.stderr


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
