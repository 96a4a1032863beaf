"""Starting JAX on several processes: a TPU pod, a Slurm job, or processes that are named one by one."""

import logging

from absl import flags

from aoe_jax.errors import UserError

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "one of several processes that the cluster knows: a TPU pod slice, Slurm, Open MPI, Kubernetes",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started one by one")
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes there are, with --coordinator", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0, with --coordinator", lower_bound=0)
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the other processes", lower_bound=1)


def start():
    """Joins the other processes, where the command line says that there are any; call it before anything else of JAX.

    Raises:
      UserError: flags that don't belong together, no cluster where one was announced, or a process that doesn't join.
    """
    explicit = {"coordinator": _COORDINATOR.value, "processes": _PROCESSES.value, "process": _PROCESS.value}
    given = [name for name, value in explicit.items() if value is not None]
    if not given and not _DISTRIBUTED.value:
        return
    if _DISTRIBUTED.value and given:
        raise UserError(f"--distributed and --{given[0]}: give one or the other; --distributed asks the cluster")
    if given and len(given) < 3:
        missing = next(name for name in explicit if name not in given)
        raise UserError(f"--{missing} is missing; --coordinator, --processes and --process go together")
    if given and _PROCESS.value >= _PROCESSES.value:
        raise UserError(
            f"--process={_PROCESS.value}: must be below --processes={_PROCESSES.value}; processes count from 0"
        )
    import jax

    names = {"coordinator_address": _COORDINATOR.value, "num_processes": _PROCESSES.value, "process_id": _PROCESS.value}
    try:
        jax.distributed.initialize(**names, initialization_timeout=_JOIN_TIMEOUT.value)
    except ValueError as e:
        raise UserError(
            f"--distributed: no cluster was found here ({e}); give --coordinator, --processes and --process"
        ) from e
    except Exception as e:  # of the coordination service, each of a kind of its own
        raise UserError(_never_joined(str(e))) from e
    if jax.process_index() > 0:
        logging.getLogger("aoe_jax").setLevel(logging.WARNING)
    logging.getLogger(__name__).info("%d processes, %d devices", jax.process_count(), jax.device_count())


def _never_joined(message):
    text = " ".join(message.split())
    return (
        f"process {_PROCESS.value if _PROCESS.value is not None else '?'} of {_PROCESSES.value or '?'} could not join the "
        f"others within --join_timeout={_JOIN_TIMEOUT.value} s: {text[:300]}"
    )


def barrier(name):
    """Waits until every process is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
