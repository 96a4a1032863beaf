"""The paper's AdamW: betas (0.9, 0.95), linear warm-up, cosine decay, clipped by global norm."""

import jax
import optax

from aoe_jax.config.training import TrainConfig


def learning_rate_schedule(config: TrainConfig):
    """Linear warm-up from 0 to the peak, then a cosine to the final rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
    )


def decayed(params):
    """Which parameters decay: all but norm scales, biases, thresholds and embedding tables."""
    others = ("scale", "norm", "bias", "threshold", "embedding")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(others), params
    )


def no_routers(params):
    """Which parameters are not those of a router."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.startswith("w_router"), params
    )


def make_optimizer(config: TrainConfig):
    """The optax optimiser; in the first `train.router_steps` steps it updates routers alone."""
    schedule = learning_rate_schedule(config)
    steps = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decayed),
    ]
    if config.router_steps:
        zero = optax.masked(optax.set_to_zero(), no_routers)
        frozen = optax.conditionally_transform(zero, lambda step: step < config.router_steps)
        # Gradients, which neither the norm nor the moments then know of; and updates, for weights
        # decay without a gradient.
        steps = [frozen, *steps, frozen]
    return optax.chain(*steps)
