"""The train step: loss, gradients, update, as one pure function of state and batch.

B sequences, S positions, L layers, n experts.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax

from aoe_jax.config import Config
from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.parallel import sum_over_tokens
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.model.decoder import Decoder, initial_routing_state, output_projection
from aoe_jax.model.loss import consistent_cross_entropy, cross_entropy
from aoe_jax.training.optimizer import learning_rate_schedule, make_optimizer


@flax.struct.dataclass
class TrainState:
    """All that a step changes."""

    step: jax.Array  # [] int32, steps done
    skipped: (
        jax.Array
    )  # [] int32, steps among them that updated nothing, for their loss or gradient wasn't finite
    params: dict
    routing_state: dict  # arrays [L, ...] by name, what the selection method has beside parameters
    opt_state: optax.OptState


def init_state(config: Config, seed):
    """The state before the first step; jit it with output shardings, so that nothing passes through
    the host.
    """
    shape = (
        config.train.batch_size // config.train.accumulate,
        config.data.seq_len,
    )  # one that the mesh divides
    params = Decoder.from_config(config).init(jax.random.key(seed), jnp.zeros(shape, jnp.int32))[
        "params"
    ]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero, zero, params, initial_routing_state(config), make_optimizer(config.train).init(params)
    )


def sequence_nll(decoder: Decoder, params, routing_state, batch, document_mask, key=None):
    """Sum of the negative log-likelihood over a batch's targets, in nats.

    Args:
      decoder: the model.
      params: its parameters.
      routing_state: of the selection method, arrays `[L, ...]` by name.
      batch: `inputs`, `targets`, `segment_ids` `[B, S]` int32, the last 0 for padding, which counts
        in no statistic and takes no place in expert choice; and `weights` `[B, S]` float32, what
        each target counts in the sum.
      document_mask: whether to attend within documents only.
      key: for what layers draw at random in training, or None.

    Returns:
      `(nll, stats)`: a float32 scalar, and `LayerStats` stacked over layers.
    """
    hidden, stats = _features(decoder, params, routing_state, batch, document_mask, key)
    with jax.named_scope("loss"):
        projection = output_projection(params)
        nll = sum_over_tokens(
            cross_entropy, hidden, *projection, batch["targets"], batch["weights"]
        )
    return nll, stats


def two_passes(decoder: Decoder, params, routing_state, batch, document_mask, key, consistency):
    """A batch passed twice, with other random draws; arguments and statistics as in `sequence_nll`,
    means of both.

    Returns:
      `(loss, nll, divergence, stats)`: the sums of `loss.consistent_cross_entropy` over the batch's
        targets.
    """
    one_pass = partial(_features, decoder, params, routing_state, batch, document_mask)
    hidden, stats = jax.lax.map(one_pass, jax.random.split(key, 2))
    with jax.named_scope("loss"):
        function = partial(consistent_cross_entropy, consistency)
        projection = output_projection(params)
        sums = sum_over_tokens(
            function, tuple(hidden), *projection, batch["targets"], batch["weights"]
        )
    return *sums, jax.tree.map(lambda a: a.mean(axis=0), stats)


def _features(decoder, params, routing_state, batch, document_mask, key):
    """`(hidden [B, S, d], LayerStats)`; arguments as in `sequence_nll`."""
    return decoder.apply(
        {"params": params},
        batch["inputs"],
        batch["segment_ids"] if document_mask else None,
        (batch["segment_ids"] > 0).astype(jnp.float32),
        routing_state,
        rngs=None if key is None else {"experts": key},
        method="features",
    )


def training_loss(
    config: Config, params, routing_state, batch, key, total_weight=None, before=None
):
    """Mean nll plus the balance losses, and what is reported of them.

    The mean is over the weight of the batch or, where it is one of several micro-batches, over
    `total_weight`; `before` is then what the metrics of the one before it have as `so_far`. Of
    several passes the loss has the sum of their nll, and the mean is reported.
    """
    decoder, kind = Decoder.from_config(config, training=True), LAYERS[config.experts.kind]
    total_weight = jnp.maximum(batch["weights"].sum() if total_weight is None else total_weight, 1)
    of_batch = decoder, params, routing_state, batch, config.data.document_mask, key
    reported = {}
    if kind.passes == 1:
        nll, stats = sequence_nll(*of_batch)
        loss = nll = nll / total_weight
    else:
        *sums, stats = two_passes(*of_batch, config.method_settings.consistency_weight)
        loss, nll, divergence = (value / total_weight for value in sums)
        nll, reported["divergence"] = nll / kind.passes, divergence
    with jax.named_scope("balance"):
        of_losses, so_far = _with_shares_so_far(config, stats, before)
        of_batch = balance_loss(of_losses.load, stats.mean_probability)
        aux_loss = (of_batch if stats.sequence_loss is None else stats.sequence_loss).mean()
        confidence_entropy = stats.confidence_entropy.mean()
        of_method = _method_losses(config, of_losses, routing_state, batch, params)
    loss += (
        config.balance.aux_weight * aux_loss + config.balance.entropy_weight * confidence_entropy
    )
    if stats.coupling is not None:
        of_method["coupling_loss"] = (config.balance.coupling_weight, stats.coupling.mean())
    if stats.z_loss is not None:
        of_method["z_loss"] = (config.balance.z_weight, stats.z_loss.mean())
    loss += sum(weight * value for weight, value in of_method.values())
    of_some = {
        name: getattr(stats, name)
        for name in ("dropped_share", "live")
        if getattr(stats, name) is not None
    }
    reported |= {name: value for name, (_, value) in of_method.items()}
    return loss, of_some | reported | {
        "stats": stats._replace(per_token=None),
        "so_far": so_far,
        "loss": loss,
        "nll": nll,
        "aux_loss": aux_loss,
        "load": stats.load,
        "confidence_entropy": stats.confidence_entropy,
        "mean_score": stats.mean_score,
        "score_spread": stats.score_spread,
    }


def _with_shares_so_far(config, stats, before):
    """The statistics with the mean shares of tokens in all micro-batches so far, which have no
    gradient; number and sums.

    That is how Qiu et al. 2025 (arXiv 2501.11873) have balance losses of the global batch where
    gradients are accumulated.
    """
    method = _method(config)
    if method is None:
        return stats, None
    shares = {"load": stats.load} | {
        name: a for name, a in (stats.records or {}).items() if name in method.shares
    }
    so_far = jnp.ones(()), shares
    if before is None:
        return stats, so_far
    number, sums = so_far = jax.tree.map(jnp.add, before, so_far)
    means = {name: share / number for name, share in sums.items()}
    load = means.pop("load")
    return stats._replace(load=load, records=stats.records and stats.records | means), so_far


def _method(config):
    return SELECTIONS[config.experts.selection] if LAYERS[config.experts.kind].selects else None


def _method_losses(config, stats, routing_state, batch, params):
    method = _method(config)
    if method is None:
        return {}
    token_weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    return method.losses(
        config, stats, stats.per_token, routing_state, token_weights, _of_experts(params)
    )


def _of_experts(params):
    """The parameters of the layers of experts by name, stacked."""
    return params["layers"]["experts"]


def _with_experts(params, changed):
    """The parameters with some of those of the layers of experts replaced."""
    layers = params["layers"]
    return params | {"layers": layers | {"experts": layers["experts"] | changed}}


def make_train_step(config: Config):
    """`(state, batch) -> (state, metrics)`; gradients are averaged over `train.accumulate`
    micro-batches.

    Where the loss or the gradient isn't finite, the step counts, for the schedule as well, but
    parameters, moments and the state of routing stay as they were.
    """
    optimizer = make_optimizer(config.train)
    schedule = learning_rate_schedule(config.train)
    n_micro = config.train.accumulate
    loss, method = partial(training_loss, config), _method(config)
    gradient = jax.grad(loss, has_aux=True)

    def mean_gradient(params, routing_state, batch, key):
        if n_micro == 1:
            grads, metrics = gradient(params, routing_state, batch, key)
            del metrics["so_far"]
            return grads, metrics
        # Every n-th sequence, so that each device has its share of each micro-batch.
        micro = jax.tree.map(lambda a: a.reshape(-1, n_micro, *a.shape[1:]).swapaxes(0, 1), batch)
        # So that a target counts the same in whichever micro-batch it is.
        mean_weight = batch["weights"].sum() / n_micro
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), micro)
        so_far = jax.eval_shape(loss, params, routing_state, one, key)[1]["so_far"]

        def add(before, numbered):
            (total, so_far), (number, micro_batch) = before, numbered
            own_key = jax.random.fold_in(key, number)
            grads, metrics = gradient(
                params, routing_state, micro_batch, own_key, mean_weight, so_far
            )
            total = jax.tree.map(lambda t, g: t + g / n_micro, total, grads)
            return (total, metrics.pop("so_far")), metrics

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (params, so_far))
        (grads, _), metrics = jax.lax.scan(add, zeros, (jnp.arange(n_micro), micro))
        return grads, jax.tree.map(lambda m: m.mean(axis=0), metrics)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        grads, metrics = mean_gradient(state.params, state.routing_state, batch, key)
        stats = metrics.pop("stats")
        with jax.named_scope("update"):
            grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        def updated(new, old):
            """The new values, where the update counts; counters always go on."""
            return jax.tree.map(
                lambda n, o: jnp.where(finite, n, o) if jnp.issubdtype(n.dtype, jnp.inexact) else n,
                new,
                old,
            )

        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = updated(optax.apply_updates(state.params, updates), state.params)
            opt_state = updated(opt_state, state.opt_state)
            metrics |= {
                "update_norm": optax.tree.norm(updates),
                "param_norm": optax.tree.norm(params),
            }
        routing_state = state.routing_state
        if routing_state:
            with jax.named_scope("balance"):
                weights = _of_experts(params)
                changed = method.next_parameters(config, weights, routing_state, stats)
                params = _with_experts(
                    params, updated(changed, {name: weights[name] for name in changed})
                )
                routing_state = updated(
                    method.next_state(config, routing_state, stats), routing_state
                )
        skipped = state.skipped + ~finite
        metrics |= {
            "grad_norm": grad_norm,  # before clipping
            "learning_rate": schedule(state.step),
            "finite": finite,
            "skipped": skipped,
        }
        return TrainState(state.step + 1, skipped, params, routing_state, opt_state), metrics

    return train_step
