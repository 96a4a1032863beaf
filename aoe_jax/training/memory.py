"""Memory in bytes: what this process and its devices hold, and what a compiled step needs."""

from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


def host_memory():
    """Resident memory of this process, now and at the peak that the kernel keeps; empty unless the
    system is Linux.
    """
    if not _STATUS.exists():
        return {}
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}
    return {"host_memory_bytes": 1024 * kib["VmRSS"], "host_memory_peak_bytes": 1024 * kib["VmHWM"]}


def device_memory():
    """Memory in use, now and at its peak, of the fullest device of this process; empty if the
    backend doesn't count it, as on CPU.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"device_memory_bytes": "bytes_in_use", "device_memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(s[source] for s in stats)
        for name, source in names.items()
        if all(source in s for s in stats)
    }


def program_memory(state, step):
    """Memory that training needs on a device.

    Args:
      state: the train state, as arrays.
      step: the compiled step.

    Returns:
      `state_bytes` on the fullest device of this process; and by the compiler's count
      `argument_bytes`, the state with a batch, and `temporary_bytes`.
    """
    held = {}
    for array in jax.tree.leaves(state):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    analysis = step.memory_analysis()
    return {
        "state_bytes": max(held.values()),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
