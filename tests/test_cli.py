"""Tests how commands parse flags, how they end, the list of commands, and their help. Other tests
run every command.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gcsfs.retry import HttpError
from jax.errors import JaxRuntimeError

from aoe_jax import cli
from aoe_jax.__main__ import commands
from aoe_jax.errors import Interrupted, MachineFault, Preempted, Terminated, UserError
from tests.forking import ENVIRONMENT
from tests.hasty import xla_flags
from tests.in_process import execute, logging_restored
from tests.runs import ROOT, corpus_folder

PACKAGE_FILES = {"commands.ini", "py.typed", "h100.txtpb", "report.md.j2", "modeling_aoe.py"}
SHIPPED = {  # how commands with the configurations and suites of the package end
    "aoe-train --config=aoe_jax:tinny --workdir=x": "choose one of 1b, doctor, finetune",
    "aoe-train --config=aoe_jax:tiny:mo --workdir=x": "configs/tiny.py:mo is no variant; choose",
    "aoe-train --config=aoe_jax:doctor": "--workdir is missing",
    "aoe-finetune --workdir=x": "--model is missing; name the directory of a model",
    "aoe-finetune --model=x --config=aoe_jax:tiny": "--config=aoe_jax:tiny: name a model with",
    "aoe-compare --suite=aoe_jax:leaderboard --arms=moe_mpi --report --workdir=x": "has no runs to",
}
CONFIG = """
from aoe_jax.storage.config_files import default_config
from sizes import WIDTH

def get_config():
    config = default_config()
    config.model.update(n_layers=1, n_heads=2, d_model=WIDTH, vocab_size=300, max_len=32)
    config.experts.update(n_experts=4, top_k=2, d_ffn=32, d_low=8)
    config.data.update(name="text", path={texts!r}, cache={cache!r}, seq_len=32)
    config.train.update(steps=2, batch_size=2, warmup=0.5, log_every=1)
    return config
"""


def noted(error):
    error.add_note("--------------------\nFor simplicity, JAX has removed its internal frames")
    error.add_note("the same command goes on\nand more")
    return error


FULL = "No space left on device"
FILLED = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."
ENDS = {  # name -> exception, exit status, last line on stderr, has a traceback, ends in order
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
    "an extra that is not installed": (
        ModuleNotFoundError("No module named 's3fs.core'", name="s3fs.core"),
        *(2, "error: the package s3fs is missing; pip install '.[s3]'", False, False),
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


# Prints, or receives two SIGTERMs while a model is written.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from aoe_jax import cli
what, output = sys.argv.pop(), sys.argv.pop()
def main():
    if what == "print":
        print("r\\u00e9sum\\u00e9 \\U0001F680")
        return 3
    from aoe_jax.formats.writing import new_directory
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
    program = [sys.executable, "-c", PROGRAM, tmp_path / "model", what]
    command = ["bash", "-c", script, "bash", *program]
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


def test_the_list_has_every_command_with_one_line():
    status, stdout, stderr = execute(["-m", "aoe_jax"])
    assert status == 0, stderr
    lines = stdout.splitlines()
    assert all(len(line) <= 110 for line in lines)
    for script, module, about in commands():
        assert any(re.fullmatch(rf"{script} +{module} +{re.escape(about)}", line) for line in lines)
    has_command = re.compile(r"^(command = |def command\(\))", re.MULTILINE)
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in ROOT.glob("aoe_jax/**/*.py")
        if has_command.search(path.read_text())
    }
    assert found == {module for _, module, _ in commands()}
    status, stdout, stderr = execute(["-m", "aoe_jax", "train"])
    assert (status, stdout) == (2, "") and "unexpected argument 'train'" in stderr


@pytest.mark.parametrize(("module", "about"), [(name, about) for _, name, about in commands()])
def test_help(module, about):
    status, stdout, stderr = execute(["-m", module, "--help"])
    assert status == 0, stderr
    assert stdout.startswith(f"{about}\n\n    python ")
    assert all(len(line) <= 100 for line in stdout.splitlines())
    flags = re.findall(r"^  (?:-h,)?--(?:\[no\])?([\w-]+)", stdout, re.MULTILINE)
    assert {"debug", "retry_seconds"} < set(flags) and len(flags) == len(set(flags))
    file = ROOT.joinpath(*module.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert ("coordinator" in flags) == ("distributed.start()" in file.read_text())
    assert ("config" in flags) == ("--config.GROUP.FIELD" in stdout)


@pytest.mark.slow
def test_a_wheel_trains_in_any_folder(tmp_path):
    """The user's own configuration imports another file from its folder."""
    source, installed, own = tmp_path / "source", tmp_path / "installed", tmp_path / "own"
    source.mkdir()
    own.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "aoe_jax", source / "aoe_jax", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", f"--target={installed}"]
    subprocess.run([*pip, "install", *options, str(source)], check=True)
    files = {path.relative_to(installed) for path in installed.glob("aoe_jax/**/*")}
    tracked = {path.relative_to(source) for path in source.glob("aoe_jax/**/*")}
    assert {path for path in files if "__pycache__" not in path.parts} == tracked
    assert {path.name for path in files} > PACKAGE_FILES
    assert {path.name for path in (installed / "bin").glob("aoe-*")} == {
        script for script, _, _ in commands()
    }

    (own / "sizes.py").write_text("WIDTH = 16\n")
    content = CONFIG.format(texts=str(corpus_folder()), cache=str(tmp_path / "cache"))
    (own / "mine.py").write_text(content)
    status, stdout, stderr = run_installed(installed, own, "aoe-train", "--help")
    assert status == 0 and "--workdir" in stdout, stderr
    command = "aoe-train", "--config=mine.py", "--workdir=run"
    status, stdout, stderr = run_installed(installed, own, *command)
    assert status == 0, stderr
    assert stdout.startswith("result    step 2, 128 tokens, validation nll ")
    assert "aoe_jax.eval" in stdout
    assert (own / "run" / "training.png").exists()
    for command, words in SHIPPED.items():
        status, stdout, stderr = run_installed(installed, own, *command.split())
        assert (status, stdout) == (2, "") and words in stderr, stderr


def run_installed(installed: Path, folder, name, *arguments):
    """Runs a console script from another folder: `(status, stdout, stderr)`."""
    done = subprocess.run(
        [str(installed / "bin" / name), *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(installed), "XLA_FLAGS": xla_flags()},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr
