"""Continues the training of a model: `--config=configs/finetune.py:DIR`, where DIR contains the
model as safetensors.

The groups `model`, `experts`, `routing` and `balance` and the tokenizer are read from DIR. Set the
corpus, the steps and the learning rate, and for models from the Hugging Face hub also `balance`.
"""

from pathlib import Path

from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.loading import read_config
from aoe_jax.storage.config_files import default_config, update_groups


def get_config(directory=None):
    if not directory:
        raise UserError(
            "configs/finetune.py: name the directory of a model, --config=aoe_jax:finetune:DIR"
        )
    directory = Path(directory).expanduser()
    model = read_config(directory)
    found = model.to_dict()
    config = default_config()
    config.model.update(found["model"])
    config.experts.update(found["experts"])
    config.balance.update(found["balance"])
    update_groups(config, {"routing": found["routing"]})
    tokenizer = saved_tokenizer(directory)
    config.data.update(
        seq_len=found["data"]["seq_len"], tokenizer=str(tokenizer) if tokenizer.exists() else None
    )
    config.train.update(init_from=str(directory), learning_rate=1e-4, final_learning_rate=1e-5)
    return config
