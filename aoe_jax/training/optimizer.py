"""The paper's AdamW: betas (0.9, 0.95), warm-up, cosine decay, and clipping by the global norm."""

import optax
from flax.traverse_util import path_aware_map

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.training import TrainConfig
from aoe_jax.model.declared import declared


def learning_rate_schedule(config: TrainConfig):
    """Linear warm-up from 0 to the peak, then cosine decay to the final rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
    )


def decayed(params):
    """A tree of bools: True where weight decay applies, as `aoe_jax.parameters` declares it."""
    return path_aware_map(lambda path, _: declared("/".join(path)).decays, params)


def no_routers(params):
    """A tree of bools: False for the parameters of routers, True for all others."""
    return path_aware_map(lambda path, _: not path[-1].startswith("w_router"), params)


def scale_scoring(experts: ExpertsConfig, rate):
    """An optax transformation that scales, by `rate`, updates of parameters that compute scores."""
    # Parameter -> s: its first s columns compute scores; None: all columns do.
    columns = {"w_router": None, "w_router_hidden": None}
    if experts.kind == "aoe":
        columns = {"w_gate_down" if experts.low_rank else "w_gate": experts.score_neurons}

    def scaled(path, update):
        if path[0] != "layers" or path[-1] not in columns:
            return update
        return update.at[..., : columns[path[-1]]].multiply(rate)

    return optax.stateless(lambda updates, _: path_aware_map(scaled, updates))


def make_optimizer(config: TrainConfig, experts: ExpertsConfig):
    """The optax optimiser; in the first `train.router_steps` steps it updates only routers."""
    schedule = learning_rate_schedule(config)
    steps = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decayed),
    ]
    if config.scoring_rate != 1:
        steps.append(scale_scoring(experts, config.scoring_rate))
    if config.router_steps:
        zero = optax.masked(optax.set_to_zero(), no_routers)
        frozen = optax.conditionally_transform(zero, lambda step: step < config.router_steps)
        # The first `frozen` sets the gradients of all but routers to zero, so that the global norm
        # and the moments exclude them. The last `frozen` removes their weight decay.
        steps = [frozen, *steps, frozen]
    return optax.chain(*steps)
