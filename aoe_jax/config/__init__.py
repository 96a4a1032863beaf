"""Configuration: frozen dataclasses with named errors, and the groups of
`--config.GROUP.FIELD=VALUE`, a file each.

`configs/*.py` return a `ml_collections.ConfigDict` (start from `default_config()`);
`Config.from_config_dict` checks it: every group by itself, then its `check` against the others.
"""

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import (
    BY_SCORES_ALONE,
    SELECTION_NAMES,
    UNSELECTIVE_KINDS,
    ExpertsConfig,
    matched_width,
)
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config, default_config
from aoe_jax.config.training import CheckpointConfig, TrainConfig

__all__ = [
    "BY_SCORES_ALONE",
    "SELECTION_NAMES",
    "UNSELECTIVE_KINDS",
    "BalanceConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ExpertsConfig",
    "MeshConfig",
    "ModelConfig",
    "TrainConfig",
    "default_config",
    "matched_width",
]
