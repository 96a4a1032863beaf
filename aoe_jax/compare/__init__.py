"""Compares arms: trains the runs of a suite, measures them and writes reports."""
