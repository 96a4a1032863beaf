"""Recognises temporary faults of disks, networks and memory, and repeats the failed calls."""

import contextlib
import errno
import logging
import os
import re
import time

from aoe_jax.errors import Failure, MachineFault, UserError

log = logging.getLogger(__name__)

retry_seconds = 60.0  # time limit for repeating a call; commands set it to --retry_seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts

# System errors that depend on the file or the arguments, so repeating the call is useless.
_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ERANGE}
_LASTING |= {errno.EDOM, errno.ENAMETOOLONG, errno.EXDEV, errno.EPIPE, errno.ENOSYS}
_LASTING |= {errno.EOPNOTSUPP, errno.ELOOP}
# tensorstore and XLA report system errors and status codes only in the text of their messages.
_STATUSES = "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED"
_AS_TEXT = re.compile(
    "|".join(
        [re.escape(os.strerror(code)) for code in errno.errorcode if code not in _LASTING]
        + [_STATUSES, "ABORTED|CANCELLED", "Out of memory", r"HTTP (response )?code: (429|5\d\d)"]
        + ["^Forbidden: "]  # how gcsfs begins its message for status 403
    )
)
# Messages for a lack of device memory. On CPU, allocations within a program fail with INTERNAL.
_FILLED = re.compile("RESOURCE_EXHAUSTED|INTERNAL: .*Out of memory")
# Exceptions, as `PACKAGE.CLASS`, that clients of stores and downloads raise for network faults.
_UNREACHABLE = {
    "aiohttp.ClientError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "google.RefreshError",
    "google.TransportError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.ChunkedEncodingError",
    "requests.ConnectionError",
    "requests.Timeout",
}
_NO_CREDENTIALS = {"botocore.NoCredentialsError", "google.DefaultCredentialsError"}


def _causes(error):
    """A list of an exception, its cause, the cause of that, and so on; the root cause is last."""
    return [error, *_causes(error.__cause__)] if error else []


def _names(error):
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).mro()}


def _is_any(error, names):
    return any(_names(cause) & names for cause in _causes(error))


def is_fault(error: BaseException) -> bool:
    """Whether a temporary fault of the machine, a disk or a network caused an exception. A lack of
    device memory is no such fault, because every later attempt would fail too.
    """
    is_lasting = fills_device(error) or _is_any(error, {"huggingface_hub.OfflineModeIsEnabled"})
    return not is_lasting and any(map(_is_fault_itself, _causes(error)))


def _is_fault_itself(error):
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _LASTING
    passes = isinstance(error, MemoryError | TimeoutError | ConnectionError) or is_of_network(error)
    return passes or bool(_AS_TEXT.search(str(error)))


def _of_jax(error):
    return [cause for cause in _causes(error) if type(cause).__name__ == "JaxRuntimeError"]


def fills_device(error: BaseException) -> bool:
    """Whether an exception of JAX says that a program needs more memory than its device has."""
    return any(_FILLED.match(str(cause)) for cause in _of_jax(error))


def is_of_network(error: BaseException) -> bool:
    """Whether an exception of a client says that a server was unreachable or overloaded, or that a
    store refused access, which also happens when a token has expired.
    """
    of_store = str(getattr(error, "code", None) or getattr(error, "status", ""))
    answer = str(getattr(getattr(error, "response", None), "status_code", ""))
    return bool(
        re.fullmatch(r"401|403|408|429|5\d\d", of_store)
        or re.fullmatch(r"408|429|5\d\d", answer)
        or _names(error) & _UNREACHABLE
    )


def lacks_credentials(error: BaseException) -> bool:
    """Whether a client of an object store found no credentials of the user."""
    return _is_any(error, _NO_CREDENTIALS)


def is_fault_of_write(error: BaseException) -> bool:
    """Whether a temporary fault prevented a write; missing permission does not count as one."""
    forbidden = (errno.EACCES, errno.EPERM, errno.EROFS)
    return is_fault(error) and getattr(error, "errno", None) not in forbidden


def status_of(error: BaseException) -> int:
    """The exit status of a program that an exception ends. An exception of JAX that a fault caused
    has status 1, because only its traceback explains it.
    """
    if isinstance(error, Failure):
        return error.status
    if fills_device(error) or lacks_credentials(error):
        return UserError.status
    return MachineFault.status if is_fault(error) and not _of_jax(error) else 1


def reason(error: BaseException) -> str:
    """Returns the first line of the message of an exception's root cause."""
    first = _causes(error)[-1]
    for code in (errno.ENOSPC, errno.EDQUOT):
        if getattr(first, "errno", None) == code or os.strerror(code) in str(first):
            return os.strerror(code)
    text = getattr(first, "strerror", None) or str(first).strip()
    return (text.splitlines() or [type(first).__name__])[0][:300]


@contextlib.contextmanager
def refusing(what, cure="", kinds=OSError):
    """A context that turns exceptions of type `kinds` into `UserError`, except temporary faults."""
    try:
        yield
    except kinds as error:
        if is_fault(error):
            raise
        raise UserError(f"{what} ({reason(error)}){cure}") from error


def patiently(what, call):
    """Returns `call()`, and repeats the call after a temporary fault. Raises `MachineFault` when
    `retry_seconds` have passed since the first fault, and `UserError` at once if a permission is
    missing. Messages begin with `what`, such as "checkpoint 5 cannot be read".
    """
    deadline, pause = None, _FIRST_PAUSE
    while True:
        try:
            return call()
        except PermissionError as e:
            where = f": {e.filename}" if e.filename else ""
            raise UserError(f"{what} ({reason(e)}{where})") from e
        except Exception as e:
            if isinstance(e, Failure) or not is_fault(e):
                raise
            deadline = deadline or time.monotonic() + retry_seconds
            pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                tried = f"it was tried for {retry_seconds:g} s"
                raise MachineFault(f"{what} ({reason(e)}); {tried}") from e
            log.warning(f"{what} ({reason(e)}); next try in {pause:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


class Tolerated:
    """A context for files that a run does not need: logs the first of consecutive exceptions."""

    def __init__(self, name):
        """`name` is the file's name in the log."""
        self._name, self._has_failed = name, False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        is_failure = isinstance(error, Exception)  # KeyboardInterrupt and `Stopped` are no failures
        if is_failure and not self._has_failed:
            log.warning(f"{self._name} cannot be written ({reason(error)}); the run goes on")
        self._has_failed = is_failure
        return is_failure
