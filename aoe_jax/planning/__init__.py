"""Estimates training steps on other devices, and checks this machine."""
