"""Reads and writes models in the formats of Hugging Face and in our own format `aoe`."""
