"""Comparisons of arms: suites of training runs, measurements and reports."""
