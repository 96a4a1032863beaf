"""Memory in bytes: of this process, of its devices, and what a compiled step needs of a device."""

from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


def host_memory():
    """Resident memory of this process, now and at its peak, as Linux keeps them; nothing elsewhere.

    The peak is the kernel's own, so that nothing between two looks is missed.
    """
    if not _STATUS.exists():
        return {}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}
    return {"host_memory_bytes": 1024 * kib["VmRSS"], "host_memory_peak_bytes": 1024 * kib["VmHWM"]}


def device_memory():
    """Memory in use, now and at its peak, of the fullest device of this process; nothing where the
    backend, as CPU's, has no count of it: see `program_memory`."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    names = {"device_memory_bytes": "bytes_in_use", "device_memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(s[source] for s in stats)
        for name, source in names.items()
        if all(s is not None and source in s for s in stats)
    }


def program_memory(state, step):
    """What training needs of a device: what it holds between steps, and what the compiler plans for
    a step.

    Args:
      state: the train state, as arrays.
      step: the compiled step that takes it.

    Returns:
      `state_bytes`, of the fullest device of this process; `argument_bytes`, that state with a
      batch, and `temporary_bytes`, as the compiler counts them.
    """
    held = {}
    for array in jax.tree.leaves(state):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    analysis = step.memory_analysis()
    planned = {"argument_bytes": "argument_size_in_bytes", "temporary_bytes": "temp_size_in_bytes"}
    return {"state_bytes": max(held.values())} | {
        name: getattr(analysis, source) for name, source in planned.items()
    }
