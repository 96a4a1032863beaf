"""AdamW as the paper trains with it: betas (0.9, 0.95), linear warm-up, cosine decay, clipped by global norm."""

import jax
import optax

from aoe_jax.config import TrainConfig


def learning_rate_schedule(config: TrainConfig):
    """Linear warm-up from 0 to the peak, then a cosine to the final learning rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.final_learning_rate,
    )


def decayed(params):
    """Which parameters decay: every matrix, but neither norm scales, biases, thresholds nor embedding tables."""
    others = ("scale", "norm", "bias", "threshold", "embedding")
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(others), params)


def make_optimizer(config: TrainConfig):
    """The optimiser as an optax transformation."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate_schedule(config), b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decayed),
    )
