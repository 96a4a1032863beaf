"""Models as safetensors and `config.json`: those of the Hugging Face hub, and our own format `aoe`.

`architectures.py` has the tables of all known tensors and configuration fields, and describes our
own format; `reading.py` reads a directory, `writing.py` writes one.
"""
