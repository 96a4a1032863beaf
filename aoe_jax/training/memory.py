"""Memory in bytes: what this process and its devices hold, and what a compiled step needs."""

import re
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")


def host_memory():
    """Resident memory of this process, now and at the peak that the kernel keeps; {} off Linux."""
    if not _STATUS.exists():
        return {}
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", _STATUS.read_text()))
    names = {"host_memory_bytes": "VmRSS", "host_memory_peak_bytes": "VmHWM"}
    return {name: 1024 * int(kib[field]) for name, field in names.items()}


def device_memory():
    """Memory of this process's fullest device, now and at peak; {} where uncounted, as on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"device_memory_bytes": "bytes_in_use", "device_memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(s[source] for s in stats)
        for name, source in names.items()
        if all(source in s for s in stats)
    }


def program_memory(state, step):
    """`{name: bytes}` of each device: `state_bytes` of an evenly split state and, by the compiler's
    count for a step, `argument_bytes` (state and batch) and `temporary_bytes`.
    """
    analysis = step.memory_analysis()
    return {
        "state_bytes": sum(a.addressable_data(0).nbytes for a in jax.tree.leaves(state)),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
