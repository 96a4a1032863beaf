"""Estimates of training steps on other devices, and checks of this machine."""
