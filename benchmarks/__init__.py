"""Measured claims: every figure in the README comes from a command here."""
