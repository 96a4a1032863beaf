"""Eight virtual CPU devices for every test, and compilation in haste."""

import os

from tests.hasty import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
