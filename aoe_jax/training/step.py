"""The train step: loss, gradients, update, as one pure function of state and batch."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from aoe_jax.config.run import Config
from aoe_jax.model.declared import state_shardings
from aoe_jax.model.decoder import Decoder, initial_params, initial_routing_state, output_projection
from aoe_jax.model.vocabulary import cross_entropy, sum_over_tokens
from aoe_jax.moe.load_balance import balance_loss
from aoe_jax.sharding import replicated, with_shardings
from aoe_jax.training.optimizer import learning_rate_schedule, make_optimizer


@flax.struct.dataclass
class TrainState:
    """The arrays that a step changes."""

    step: jax.Array  # [] int32, steps done
    skipped: jax.Array  # [] int32, steps whose update was skipped
    params: dict
    routing_state: dict  # `{name: [L, ...]}`, the arrays of `Method.state`, stacked over layers
    opt_state: optax.OptState
    recent_norms: jax.Array | None = None  # [3], see `is_spike`; None without `train.skip_above`


def init_state(config: Config, seed):
    """A random state. Jit it with output shardings, because the state may not fit on one device."""
    return first_state(config, initial_params(config, seed), initial_routing_state(config))


def first_state(config: Config, params, routing_state):
    """The state before the first step, with these parameters and this routing state."""
    zero, optimizer = jnp.zeros((), jnp.int32), make_optimizer(config)
    norms = jnp.zeros(3) if config.train.skip_above else None
    return TrainState(zero, zero, params, routing_state, optimizer.init(params), norms)


def train_step_on(mesh, config: Config):
    """Returns `(jitted train step, TrainState of ShapeDtypeStructs with shardings)` for a mesh."""
    state = jax.eval_shape(lambda: init_state(config, 0))
    shardings = state_shardings(mesh, state)
    results = shardings, replicated(mesh)
    step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=results)
    return step, with_shardings(state, shardings)


def new_state(config: Config, like: TrainState):
    """A random state, with the shardings of `like`, the `TrainState` of `train_step_on`."""
    shardings = jax.tree.map(lambda a: a.sharding, like)
    return jax.jit(lambda: init_state(config, config.train.seed), out_shardings=shardings)()


def sequence_nll(decoder: Decoder, params, routing_state, batch, document_mask):
    """Returns `(weighted nll sum [] float32 in nats, LayerStats stacked over layers)`.

    `batch` has `inputs`, `targets` and `segment_ids`, `[B, S]` int32, and `weights`, `[B, S]`
    float32. Segment 0 is padding. With `document_mask`, tokens attend only within their document.
    """
    hidden, stats = features(decoder, params, routing_state, batch, document_mask)
    return _sum_over_targets(params, batch, hidden), stats


def features(decoder, params, routing_state, batch, document_mask, key=None):
    """Returns `(hidden [B, S, d], LayerStats)`. Some layers draw random numbers from `key`."""
    documents = batch["segment_ids"] if document_mask else None
    token_weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    inputs = batch["inputs"], documents, token_weights, routing_state
    rngs = None if key is None else {"experts": key}
    return decoder.apply({"params": params}, *inputs, rngs=rngs, method="features")


def _sum_over_targets(params, batch, hidden, function=cross_entropy):
    with jax.named_scope("loss"):
        table = output_projection(params)
        return sum_over_tokens(function, hidden, table, batch["targets"], batch["weights"])


def training_loss(
    config: Config, params, routing_state, batch, key, total_weight=None, so_far=None
):
    """Returns `(loss, metrics)`; loss = mean nll + load balance losses + the method's losses.

    The nll is divided by the total weight of the batch or, for one of several micro-batches, by
    `total_weight`. `so_far` is `metrics["so_far"]` of the previous micro-batch.
    """
    decoder, method = Decoder.from_config(config, training=True), config.routing
    total_weight = jnp.maximum(batch["weights"].sum() if total_weight is None else total_weight, 1)
    document_mask = config.data.document_mask
    one_pass = partial(features, decoder, params, routing_state, batch, document_mask)
    sum_over_targets = partial(_sum_over_targets, params, batch)
    loss, nll, reported, stats = method.hooks.training_sums(one_pass, key, sum_over_targets)
    loss, nll, reported = jax.tree.map(lambda value: value / total_weight, (loss, nll, reported))
    with jax.named_scope("balance"):
        for_losses, so_far = _with_shares_so_far(stats, so_far)
        aux_loss = stats.sequence_loss
        if aux_loss is None:
            aux_loss = balance_loss(for_losses.load, stats.mean_probability)
        aux_loss, confidence_entropy = aux_loss.mean(), stats.confidence_entropy.mean()
        weights = params["layers"]["experts"]
        losses = method.losses(for_losses, routing_state, weights)
    loss += config.balance.aux_weight * aux_loss
    loss += config.balance.entropy_weight * confidence_entropy
    if stats.z_loss is not None:
        losses["z_loss"] = (config.balance.z_weight, stats.z_loss.mean())
    loss += sum(weight * value for weight, value in losses.values())
    reported |= {name: value for name, (_, value) in losses.items()}
    names = ("load", "confidence_entropy", "mean_score", "score_spread", "dropped_share", "live")
    found = {name: getattr(stats, name) for name in names}
    reported |= {name: value for name, value in found.items() if value is not None}
    reported |= {"loss": loss, "nll": nll, "aux_loss": aux_loss}
    return loss, reported | {"stats": stats._replace(per_token=None), "so_far": so_far}


def _with_shares_so_far(stats, before):
    """Returns `(stats, so_far)`. In `stats`, `load` and `shares` are means over the micro-batches
    so far; `so_far` is `(number of these micro-batches, {name: sum})` for `load` and `shares`.

    Neither has a gradient. Qiu et al. 2025 (arXiv 2501.11873) balance the global batch in this way.
    """
    so_far = jnp.ones(()), {"load": stats.load, "shares": stats.shares}
    if before is None:
        return stats, so_far
    number, sums = so_far = jax.tree.map(jnp.add, before, so_far)
    return stats._replace(**jax.tree.map(lambda total: total / number, sums)), so_far


def is_spike(norm, recent, limit):
    """Whether a gradient norm is more than `limit` standard deviations above the mean of recent
    norms: `(bool [], new recent [3])`.

    `recent` has the moving averages of 1, of the norm and of its squared distance from the mean
    over about 100 steps, in which a norm counts at most as the limit. The first 50 norms are never
    spikes.
    """
    mean, variance = recent[1:] / jnp.maximum(recent[0], 1e-9)
    is_settled = recent[0] > 1 - 0.99**49.5
    highest = jnp.where(is_settled, mean + limit * jnp.sqrt(variance), jnp.inf)
    counted = jnp.minimum(norm, highest)
    distance = jnp.where(recent[0] > 0, counted - mean, 0)
    return norm > highest, 0.99 * recent + 0.01 * jnp.array([1, counted, distance**2])


def make_train_step(config: Config):
    """Returns `train_step(state, batch) -> (state, metrics)`.

    If the loss or the gradient is not finite, or the gradient norm is a spike (`train.skip_above`),
    parameters, moments and routing state do not change. The step still counts, also in the learning
    rate schedule.
    """
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grads, metrics = _mean_gradient(config, state.params, state.routing_state, batch, key)
        stats = metrics.pop("stats")
        with jax.named_scope("update"):
            grad_norm = optax.tree.norm(grads)  # before clipping
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updated, recent = finite, state.recent_norms
        if recent is not None:
            spike, norms = is_spike(grad_norm, recent, config.train.skip_above)
            updated, recent = finite & ~spike, jnp.where(finite, norms, recent)

        def if_updated(new, old):
            """The new values, or the old ones after a skip; integer counters are always new."""

            def choose(n, o):
                return jnp.where(updated, n, o) if jnp.issubdtype(n.dtype, jnp.inexact) else n

            return jax.tree.map(choose, new, old)

        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = if_updated(optax.apply_updates(state.params, updates), state.params)
            opt_state = if_updated(opt_state, state.opt_state)
            metrics["update_norm"] = optax.tree.norm(updates)
            metrics["param_norm"] = optax.tree.norm(params)
        if routing_state := state.routing_state:
            with jax.named_scope("balance"):
                layers, weights = params["layers"], params["layers"]["experts"]
                new_state, changed = config.routing.update(config, routing_state, stats, weights)
                changed = if_updated(changed, {name: weights[name] for name in changed})
                params = params | {"layers": layers | {"experts": weights | changed}}
                routing_state = if_updated(new_state, routing_state)
        skipped = state.skipped + ~updated
        metrics |= {"grad_norm": grad_norm, "finite": finite, "updated": updated}
        metrics["skipped"] = skipped
        metrics["learning_rate"] = schedule(state.step)
        new = TrainState(state.step + 1, skipped, params, routing_state, opt_state, recent)
        return new, metrics

    return train_step


def _mean_gradient(config, params, routing_state, batch, key):
    """Returns `(gradients, metrics)`, both averaged over the micro-batches of a step."""
    loss, n_micro = partial(training_loss, config), config.train.accumulate
    gradient = jax.grad(loss, has_aux=True)
    if n_micro == 1:
        grads, metrics = gradient(params, routing_state, batch, key)
        del metrics["so_far"]
        return grads, metrics
    # A micro-batch has every `n_micro`-th sequence, so it is split evenly over the devices.
    micro = jax.tree.map(lambda a: a.reshape(-1, n_micro, *a.shape[1:]).swapaxes(0, 1), batch)
    # The nlls of all micro-batches are divided by the same weight, so all targets count equally.
    mean_weight = batch["weights"].sum() / n_micro
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), micro)
    so_far = jax.eval_shape(loss, params, routing_state, first, key)[1]["so_far"]

    def add(carry, numbered):
        (total, so_far), (number, micro_batch) = carry, numbered
        own_key = jax.random.fold_in(key, number)
        grads, metrics = gradient(params, routing_state, micro_batch, own_key, mean_weight, so_far)
        total = jax.tree.map(lambda t, g: t + g / n_micro, total, grads)
        return (total, metrics.pop("so_far")), metrics

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (params, so_far))
    (grads, _), metrics = jax.lax.scan(add, zeros, (jnp.arange(n_micro), micro))
    return grads, jax.tree.map(lambda m: m.mean(axis=0), metrics)
