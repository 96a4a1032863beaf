"""Runs Python commands in processes that are forked from a server, which imports libraries once.

The server starts neither a thread nor a JAX backend; its children may start both.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The server imports no modules of aoe_jax, because every command must import them itself.
LIBRARIES = [
    "absl.app",
    "array_record.python.array_record_module",
    "flax.linen",
    "grain.python",
    "jax.experimental.multihost_utils",
    "jax.experimental.pallas.ops.tpu.splash_attention",
    "jax.experimental.topologies",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ml_collections",
    "optax",
    "orbax.checkpoint",
    "safetensors.numpy",
    "scipy.stats",
    "tensorboardX",
    "tensorflow_datasets.text",
    "tokenizers",
    "tree",
]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",  # without it, benchmarks restart themselves
}
# A forked command may set only these, because libraries read other variables when imported.
OWN_VARIABLES = {"XLA_FLAGS", "PYTEST_CURRENT_TEST", "FAULT"}


class Forked:
    """A command in a forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, requests, command, environment, stderr=None):
        """Sends the request to the server and waits until the process has started."""
        self.args, self.returncode = command, None
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._stderr = None if stderr else tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            stderr = stderr or self._stderr
            files = [theirs.fileno(), self._stdout.fileno(), stderr.fileno()]
            socket.send_fds(requests, [json.dumps([command, environment]).encode()], files)
        self.pid = int(self._reports.recv(32))

    def poll(self):
        return self._wait(0)

    def wait(self, timeout=None):
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self._content(self._stdout), self._stderr and self._content(self._stderr)

    def _content(self, file):
        with file:
            file.seek(0)
            return file.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout):
        if self.returncode is None:
            self._reports.settimeout(timeout)
            try:
                report = self._reports.recv(32)
            except (BlockingIOError, TimeoutError):
                return None
            self._reports.close()
            self.returncode = int(report)
        return self.returncode


@functools.cache
def _server(preload):
    """Starts a server and returns its socket and environment. The server ends with this process.

    `preload` is a shared library for LD_PRELOAD, or "" for none.
    """
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | ENVIRONMENT | ({"LD_PRELOAD": preload} if preload else {})
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.forking", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    @atexit.register
    def _end():
        requests.close()
        server.wait()

    return requests, environment


def start(command, forked=True, stderr=None, **variables):
    """Starts a Python command line, such as `["train.py", ...]`, in the root of the repository.

    A new interpreter runs it instead of a forked process if `forked` is false, or if `variables`
    sets other variables than `OWN_VARIABLES`. The result has the methods of `subprocess.Popen` in
    both cases. `stderr` is an open file for the stderr of the command.
    """
    environment = os.environ | ENVIRONMENT | variables
    if forked:
        requests, known = _server(environment.get("LD_PRELOAD", ""))
        names = (environment.keys() | known.keys()) - OWN_VARIABLES
        if all(environment.get(name) == known.get(name) for name in names):
            return Forked(requests, command, environment, stderr)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=pipe,
        stderr=stderr or pipe,
        text=True,
    )


def _serve(requests):
    """Forks a process for each request, and returns the command in the forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:  # the client has ended, so its processes are killed
            os.killpg(0, signal.SIGKILL)
        if os.fork() == 0:
            requests.close()
            return _supervise(*json.loads(request), *files)
        for file in files:
            os.close(file)


def _supervise(command, environment, reports, stdout, stderr):
    """Forks the process of a command; reports its process number and later its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=reports) as client:
        child = os.fork()
        if child:
            client.send(str(child).encode())
            _, status = os.waitpid(child, 0)
            client.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    return command


def _become(command):
    """Runs a command line in this process like a new Python interpreter."""
    first, *sys.argv = command
    if first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(code, vars(main))
    else:
        sys.argv.insert(0, first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # otherwise the first garbage collection in a child copies all memory
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
