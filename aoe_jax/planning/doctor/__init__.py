"""Examines a machine before anything is trained on it; see `python -m aoe_jax.doctor --help`."""
