"""Published peaks of accelerators, by which the model FLOPs utilisation (MFU) is measured."""

# Dense bfloat16 FLOPs per second of a chip, by `jax.Device.device_kind`. Names must match whole,
# because other forms of a GPU have other peaks. `planning/hardware.py` names the sources.
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


def count_chips(devices):
    """The number of chips; TPU devices with the same coordinates are one chip."""
    if devices[0].platform != "tpu":
        return len(devices)
    return len({(getattr(d, "slice_index", None), *d.coords) for d in devices})


def peak_flops_per_device(devices):
    """Peak bfloat16 FLOPs per second of one of the devices, all of one kind; None if unknown."""
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return peak and peak * count_chips(devices) / len(devices)
