"""Flags by which XLA compiles in haste: most of the time of the tests goes to compiling, not to running."""

from importlib.metadata import version

FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):  # halves it; later versions refuse the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(n_devices=1):
    """For the environment, with as many virtual CPU devices."""
    return " ".join([*FLAGS, f"--xla_force_host_platform_device_count={n_devices}"])
