"""Peak FLOPs of devices, for the model FLOPs utilisation (MFU), and their memory use in bytes."""

import re
from pathlib import Path

import jax

# `jax.Device.device_kind` -> dense bfloat16 FLOPs per second of a chip. Names must match exactly,
# because variants of a GPU have different peaks. `planning/hardware.py` names the sources.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA B200": 2250e12,
}
_STATUS = Path("/proc/self/status")


def count_chips(devices):
    """The number of chips. TPU devices with the same coordinates are cores of one chip."""
    if devices[0].platform != "tpu":
        return len(devices)
    return len({(getattr(d, "slice_index", None), *d.coords) for d in devices})


def peak_flops_per_device(devices):
    """Peak bfloat16 FLOPs per second of each of `devices`, which are of one kind; None: unknown."""
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return peak and peak * count_chips(devices) / len(devices)


def process_memory():
    """Returns `{name: bytes}`: the current and peak memory use of this process on the host (only on
    Linux) and, except on CPU, on the local device that uses the most memory.
    """
    found = {}
    if _STATUS.exists():
        kib = dict(re.findall(r"(\w+):\s+(\d+) kB", _STATUS.read_text()))
        names = {"host_memory_bytes": "VmRSS", "host_memory_peak_bytes": "VmHWM"}
        found = {name: 1024 * int(kib[field]) for name, field in names.items() if field in kib}
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        found["device_memory_bytes"] = max(s["bytes_in_use"] for s in stats)
        found["device_memory_peak_bytes"] = max(s["peak_bytes_in_use"] for s in stats)
    return found


def program_memory(state, step):
    """Returns bytes per device: `state_bytes` is the size of the train state. The compiler reports
    `argument_bytes` (state and batch) and `temporary_bytes` of the compiled `step`.
    """
    analysis = step.memory_analysis()
    return {
        "state_bytes": sum(a.addressable_data(0).nbytes for a in jax.tree.leaves(state)),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }
