"""The standard files and the log of a program, and how it ends."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback

from absl import flags
from absl import logging as absl_logging

from aoe_jax.errors import Failure, Interrupted, MachineFault, Stopped, UserError
from aoe_jax.storage import retry

log = logging.getLogger(__name__)

_BROKEN_PIPE = 128 + signal.SIGPIPE  # like programs that the signal ends
_NOTES_OF_JAX = ("---", "For simplicity")


class Forgiving:
    """A file that drops what cannot be written: a disk that is full of a log ends no command."""

    def __init__(self, file):
        """Writes to `file`, such as stderr."""
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, text):
        """Writes a text if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)

    def flush(self):
        """Flushes if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def open_standard_files():
    """Opens standard files that are closed, because other files would get their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # child processes need them too
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = Forgiving(sys.stderr or open(2, "w", closefd=False))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def set_up_logging(debug):
    """Logs to stderr; without `debug`, hides the errors that threads of libraries print."""
    absl_logging.use_absl_handler()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("aoe_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not debug:
        _hide_background_errors()


def _hide_background_errors():
    # Orbax's threads print tracebacks when a read or write fails; the failure itself is raised too.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)

    def hook(kind, error, trace):
        if str(error) != "Event loop is closed":
            sys.__excepthook__(kind, error, trace)

    def unraisable_hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.excepthook, sys.unraisablehook = hook, unraisable_hook


def print_if_possible(text):
    """Prints a text; only logs a warning if that fails, because the command has done its work."""
    try:
        print(text, flush=True)
    except OSError as e:
        flush_stdout()
        log.warning(f"the result cannot be printed ({retry.reason(e)})")


def flush_stdout():
    """Flushes stdout; returns the error if it cannot be written, and drops the rest."""
    try:
        sys.stdout.flush()
    except OSError as e:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return e
    return None


def end(status):
    """Ends the program after its exit functions."""
    # Like sys.exit without the interpreter's end: before Python 3.14, a thread of a C++ library
    # that asks for Python meanwhile aborts the process.
    try:  # a signal changes no status, as with sys.exit
        with contextlib.suppress(BaseException):
            threading._shutdown()
        atexit._run_exitfuncs()
        sys.stderr.flush()
        flush_stdout()
    finally:
        os._exit(status)


def end_early(error, debug):
    """Ends the program because of an exception. The last line on stderr says why: a `Failure` with
    its exit status, a device without enough memory (2), a fault of a disk, a network or memory (5),
    a request to stop (`Stopped`), a pipe that nobody reads (141), or any other exception (1), whose
    traceback comes before. With `debug`, tracebacks of the others come too.
    """
    if isinstance(error, Stopped) and not error.others_go_on:
        print(error, file=sys.stderr, flush=True)
        end(error.status)
    elif isinstance(error, Stopped):
        _end_at_once(error.status, str(error))
    elif isinstance(error, KeyboardInterrupt):
        _end_at_once(Interrupted.status, "interrupted")
    elif isinstance(error, BrokenPipeError):
        _end_at_once(_BROKEN_PIPE, "error: nobody reads the output any more")
    status, last_line, is_foreseen = _reason_of(error)
    if debug or not is_foreseen:
        traceback.print_exception(error)
    _end_at_once(status, last_line)


def _reason_of(error):
    """The exit status and the last line of an error, and whether it needs no traceback."""
    if isinstance(error, Failure):
        notes = _notes(error) if isinstance(error, MachineFault) else ""
        return error.status, f"error: {error}{notes}", True
    status, first_line = retry.status_of(error), (str(error).strip().splitlines() or [""])[0][:300]
    if retry.fills_device(error):
        last_line = f"error: {_device_is_full(error)}"
    elif retry.lacks_credentials(error):
        wanted = "log in to the object store on this machine"
        last_line = f"error: {retry.reason(error)}; {wanted}"
    elif status == MachineFault.status:
        reason = retry.reason(error)
        why = first_line if reason in first_line else f"{first_line} ({reason})"
        last_line = f"error: {why if first_line else reason}{_notes(error)}"
    else:
        last_line = f"failed: {type(error).__name__}: {first_line}{_notes(error)}"
    of_system = isinstance(error, OSError | MemoryError) or retry.is_of_network(error)
    is_foreseen = status == UserError.status or (status == MachineFault.status and of_system)
    return status, last_line, is_foreseen


def _notes(error):
    # JAX adds notes about its traceback to the exceptions of functions that it calls.
    firsts = [note.partition("\n")[0] for note in getattr(error, "__notes__", [])]
    return "".join(f"; {first}" for first in firsts if not first.startswith(_NOTES_OF_JAX))


def _device_is_full(error):
    """Says which fields or flags of this command need less memory."""
    if "config" in flags.FLAGS:
        cure = (
            "raise train.accumulate, lower train.batch_size, set model.remat='layer', or split the "
            "model by mesh.fsdp; python -m aoe_jax.plan computes what fits"
        )
    else:
        cure = "split the model over more devices, such as --mesh=fsdp=4, or give it less at a time"
    return f"the memory of a device is exhausted ({retry.reason(error)}); {cure}"


def _end_at_once(status, last_line):
    # Unlike sys.exit, this gives threads in the background no time to print tracebacks.
    print(last_line, file=sys.stderr, flush=True)
    flush_stdout()
    os._exit(status)
