"""Flags for XLA that skip optimisations, because the tests need more time to compile programs than
to run them.
"""

from importlib.metadata import version

HASTY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The last flag halves the time, but the TPU compiler and later versions of JAX refuse it.
HASTIER = HASTY + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")


def xla_flags(n_devices=1, flags=HASTIER):
    """Returns the value of XLA_FLAGS for `n_devices` virtual CPU devices."""
    return f"{flags} --xla_force_host_platform_device_count={n_devices}"
