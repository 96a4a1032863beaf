"""Comparisons: suites of training runs with reports, and the two-stage classifier."""
