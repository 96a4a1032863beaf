"""Reads and writes Hugging Face models and our own format `aoe`."""
