"""AdamW (the paper) or Muon, the schedule of the learning rate, and clipping of the gradient."""

import optax
from flax.traverse_util import path_aware_map

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.model.declared import declared

B1, B2 = 0.9, 0.95  # AdamW's betas, as in the paper


def learning_rate_schedule(config: Config):
    """`step -> learning rate`: linear warm-up from 0 to the peak, then by `train.schedule`."""
    train, factor = config.train, config.rate_factor
    peak, final = factor * train.learning_rate, factor * train.final_learning_rate
    warmup, decay, steps = train.warmup_steps, train.decay_steps, train.steps
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
    if not decay:
        return optax.join_schedules(parts, [warmup])
    parts.append(optax.linear_schedule(peak, final, decay))
    return optax.join_schedules(parts, [warmup, steps - decay])


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


def orthogonalised(params):
    """A tree of `MuonDimensionNumbers` for the matrices that Muon updates, None for the others."""

    def numbers(path, _):
        axes = declared("/".join(path)).matrix_axes
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    return path_aware_map(numbers, params)


def update_rule(train, schedule):
    """AdamW, or Muon (Jordan et al. 2024) with the update size of Liu et al. (arXiv 2502.16982).

    Muon orthogonalises the update of each matrix of attention, and of each expert by itself. AdamW
    with Nesterov momentum updates the other parameters: embeddings, norms and routers.
    """
    decay = train.weight_decay
    first = None if train.moments_dtype == "float32" else train.moments_dtype  # None: of parameters
    if train.optimizer == "adamw":
        return optax.adamw(schedule, B1, B2, mu_dtype=first, weight_decay=decay, mask=decayed)
    return optax.chain(
        # A root mean square of 0.2 is that of AdamW's updates, so one learning rate serves both.
        optax.contrib.muon(
            1.0,
            adam_b1=B1,
            adam_b2=B2,
            mu_dtype=first,
            muon_weight_dimension_numbers=orthogonalised,
            consistent_rms=0.2,
        ),
        optax.add_decayed_weights(-decay, decayed),  # `muon` has negated the updates
        optax.scale_by_schedule(schedule),
    )


def make_optimizer(config: Config):
    """The optax optimiser; in the first `train.router_steps` steps it updates only routers."""
    train, schedule = config.train, learning_rate_schedule(config)
    steps = [optax.clip_by_global_norm(train.clip_norm), update_rule(train, schedule)]
    if train.scoring_rate != 1:
        steps.append(scale_scoring(config.experts, train.scoring_rate))
    if train.router_steps:
        zero = optax.masked(optax.set_to_zero(), no_routers)
        frozen = optax.conditionally_transform(zero, lambda step: step < train.router_steps)
        # The first `frozen` sets the gradients of all but routers to zero, so that the global norm
        # and the moments exclude them. The last `frozen` removes their weight decay.
        steps = [frozen, *steps, frozen]
    return optax.chain(*steps)
