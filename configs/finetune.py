"""Goes on training a model: `--config=configs/finetune.py:DIR`, the directory of a model as safetensors.

Model, experts and balance are the model's, and so is the tokenizer; corpus, steps and learning rate are for you to set.
"""

from pathlib import Path

from aoe_jax.config import default_config
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.reading import read_config


def get_config(directory=None):
    if not directory:
        raise UserError("configs/finetune.py: name the directory of a model, --config=configs/finetune.py:DIR")
    found = read_config(Path(directory)).to_dict()
    config = default_config()
    config.model.update(found["model"])
    config.experts.update(found["experts"])
    config.balance.update(found["balance"])
    if config.experts.gate == "sparsemixer":  # for models that are trained already
        config.experts.gate = "chosen"
    tokenizer = saved_tokenizer(Path(directory))
    config.data.update(
        seq_len=min(1024, config.model.max_len), tokenizer=str(tokenizer) if tokenizer.exists() else None
    )
    config.train.update(init_from=directory, learning_rate=1e-4, final_learning_rate=1e-5)
    return config
