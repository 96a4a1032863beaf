"""Eight virtual CPU devices for every test, and compilation in haste."""

import os

import jax

from tests.hasty import HASTY, xla_flags

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8)}
assert len(jax.devices()) == 8
os.environ["XLA_FLAGS"] = xla_flags(8, HASTY)  # the compiler for TPUs reads it later
