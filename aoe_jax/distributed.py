"""Starting JAX, also on several processes: a TPU pod, a Slurm job, or processes that are named one
by one.
"""

import hashlib
import logging
import os
import socket
import sys
import threading
import time

from absl import flags

from aoe_jax.errors import UserError

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "one of several processes that the cluster knows: a TPU pod slice, Slurm, Open MPI, Kubernetes",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for processes started one by one"
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "how many processes there are, with --coordinator", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "which of them this is, from 0, with --coordinator", lower_bound=0
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)


def start():
    """Joins the other processes, where the command line says that there are any; call it before
    anything else of JAX.

    Raises:
      UserError: flags that don't belong together, no cluster where one was announced, or a process
        that doesn't join.
    """
    _join()
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # Programs from the cache have lost the order of their collectives there, and deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
        if jax.config.jax_compilation_cache_dir:
            logging.getLogger(__name__).warning(
                "no compilation cache: on several CPU devices its programs deadlock"
            )


def _join():
    explicit = {
        "coordinator": _COORDINATOR.value,
        "processes": _PROCESSES.value,
        "process": _PROCESS.value,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if not given and not _DISTRIBUTED.value:
        return
    if _DISTRIBUTED.value and given:
        raise UserError(
            f"--distributed and --{given[0]}: give one or the other; --distributed asks the cluster"
        )
    if given and len(given) < 3:
        missing = next(name for name in explicit if name not in given)
        raise UserError(
            f"--{missing} is missing; --coordinator, --processes and --process go together"
        )
    if given:
        _meet(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN_TIMEOUT.value)
    _initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    import jax

    if jax.process_index() > 0:
        logging.getLogger("aoe_jax").setLevel(logging.WARNING)
    logging.getLogger(__name__).info(
        "%d processes, %d devices", jax.process_count(), jax.device_count()
    )


def _initialize(address, n_processes, process):
    """`jax.distributed.initialize`; where that takes too long, it ends the process, and JAX itself
    would abort it.
    """
    import jax

    joined = threading.Event()

    def watch():
        if not joined.wait(_JOIN_TIMEOUT.value):
            print(
                f"error: not all processes joined within --join_timeout={_JOIN_TIMEOUT.value} s",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        jax.distributed.initialize(
            address, n_processes, process, initialization_timeout=_JOIN_TIMEOUT.value + 60
        )
    except ValueError as e:
        raise UserError(
            f"--distributed: no cluster was found here ({e}); give --coordinator, --processes and --process"
        ) from e
    joined.set()


def _meet(address, n_processes, process, timeout):
    """Waits until all processes are there, on the port that JAX takes next: JAX can't say which one
    is missing.

    Raises:
      UserError: a bad address or number, or processes that aren't there in time, by their numbers.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"--coordinator={address}: must be HOST:PORT of process 0, such as 10.0.0.1:12345"
        )
    if process >= n_processes:
        raise UserError(
            f"--process={process}: must be below --processes={n_processes}; processes count from 0"
        )
    deadline = time.monotonic() + timeout
    if process == 0:
        _wait_for_others(address, int(port), n_processes, deadline, timeout)
    else:
        _report(address, (host, int(port)), process, deadline, timeout)


def _wait_for_others(address, port, n_processes, deadline, timeout):
    others = {}
    try:
        server = socket.create_server(("", port))
    except OSError as e:
        raise UserError(
            f"--coordinator={address}: process 0 can't listen there ({e.strerror}); name a free port"
        ) from e
    with server:
        while len(others) < n_processes - 1 and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                number = int(connection.recv(16))
                if number in others or not 0 < number < n_processes:
                    connection.close()  # it will say that nobody answers
                else:
                    others[number] = connection
            except (TimeoutError, ValueError, OSError):
                continue
        missing = sorted(set(range(1, n_processes)) - set(others))
        for connection in others.values():
            with connection:
                connection.sendall(",".join(map(str, missing)).encode() or b"go")
    if missing:
        raise UserError(_missing(missing, timeout))


def _report(address, place, process, deadline, timeout):
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(place, timeout=1) as connection:
                connection.sendall(str(process).encode())
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                answer = connection.recv(4096).decode()
        except (OSError, TimeoutError):
            time.sleep(0.2)
            continue
        if answer == "go":
            return
        if answer:
            raise UserError(_missing(answer.split(","), timeout))
        raise UserError(
            f"--process={process}: process 0 has another process of this number, or other --processes"
        )
    raise UserError(
        f"process 0 at --coordinator={address} can't be reached within --join_timeout={timeout} s"
    )


def _missing(numbers, timeout):
    names = ", ".join(map(str, numbers))
    what = f"process {names} has" if len(numbers) == 1 else f"processes {names} have"
    return f"{what} not joined within --join_timeout={timeout} s; start them all with the same --coordinator and --processes"


def barrier(name):
    """Waits until every process is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(what, text):
    """Waits until every process is here, and checks that all come with the same text.

    Raises:
      UserError: some don't, such as processes that see different disks under one name.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.int32)
    digests = multihost_utils.process_allgather(digest).reshape(-1)
    differing = np.flatnonzero(digests != digests[0])
    if differing.size:
        raise UserError(
            f"{what} of process {', '.join(map(str, differing))} differs from that of process 0; all processes must see the "
            "same --workdir and data, and get the same --config"
        )


def all_agree(holds):
    """Whether `holds` is true in every process; waits until they have all come here."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.int32(holds)).all())
