"""Models as safetensors and `config.json`: of the Hugging Face hub, and our own format `aoe`."""
