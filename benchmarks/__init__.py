"""Measured claims: the figures of speed, memory and plans in the README and docs/, each by a
command here.
"""
