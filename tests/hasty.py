"""Flags by which XLA compiles in haste: most of the time of the tests goes to compiling, not to
running.
"""

from importlib.metadata import version

HASTY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# It halves the time, but the compiler for TPUs and later versions of JAX refuse the flag.
HASTIER = HASTY + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")


def xla_flags(n_devices=1, flags=HASTIER):
    """For the environment, with as many virtual CPU devices."""
    return f"{flags} --xla_force_host_platform_device_count={n_devices}"
