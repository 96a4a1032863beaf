"""Measured claims: every figure in the README and docs/ comes from a command here."""
