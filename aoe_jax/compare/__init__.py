"""Comparisons: suites of runs under one recipe, their analysis and their report; `python -m aoe_jax.compare --help`."""
