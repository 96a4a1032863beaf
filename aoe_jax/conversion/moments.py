"""Means, second moments and choices of experts' scores, summed batch by batch.

L layers, Z experts, D merged ones, t tokens of a device, d model width, r low rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.evaluation.models import Model
from aoe_jax.moe.scoring import scores_of_all
from aoe_jax.sharding import replicated
from aoe_jax.training.step import features

_GIVEN = "given"  # the key in a layer's routing state of what its `observe` is given


@dataclass(frozen=True)
class Moments:
    """Moments of scores over tokens, in float64; arrays have the axis of layers first."""

    tokens: float
    mean: np.ndarray  # [L, Z], of the scores: norms, or router logits
    scatter: np.ndarray  # [L, Z, Z], sums over tokens of products of centred scores
    chosen: np.ndarray  # [L, Z], how many tokens chose each expert
    chosen_score: np.ndarray  # [L, Z], the sum of an expert's scores over the tokens that chose it

    @property
    def gram(self):
        """`[L, Z, Z]`, sums over tokens of products of the scores."""
        return self.scatter + self.tokens * self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def load(self):
        """`[L, Z]`, the share of the tokens that chose each expert."""
        return self.chosen / self.tokens

    def plus(self, other: "Moments"):
        """The moments over the tokens of both, by a formula that is precise where means are large
        beside deviations (Chan et al. 1979).
        """
        tokens, apart = self.tokens + other.tokens, other.mean - self.mean
        between = self.tokens * other.tokens / tokens * apart[:, :, None] * apart[:, None, :]
        return Moments(
            tokens,
            self.mean + other.tokens / tokens * apart,
            self.scatter + other.scatter + between,
            self.chosen + other.chosen,
            self.chosen_score + other.chosen_score,
        )


def score_moments(model: Model, batches: Iterable[dict]) -> Moments:
    """The `Moments` of a model's scores over the tokens of host batches, in one forward pass.

    Memory holds `[L, Z, Z]` numbers, never the scores. The choices depend on a selection bias.
    """
    step, total = observing_step(model, _score_sums), None
    for batch in tqdm(batches, desc="scores", unit="batch"):
        tokens, *sums = _in_float64(step(batch))
        found = Moments(float(tokens[0]), *sums)
        total = found if total is None else total.plus(found)
    return total


def merged_scores(model: Model, batches: Sequence[dict]):
    """A function `(w_gate_down [L, D, d, r], members [L, Z, D]) -> mean scores [L, D]`, float64.

    `members` is 1 where an AoE expert is merged into one, else 0. The means are over the tokens of
    host batches that chose a member in the model before pruning, counted once for each member that
    they chose; over all tokens if none did.
    """
    step = observing_step(model, _merged_sums)

    def mean_scores(w_gate_down, members):
        given = w_gate_down, np.asarray(members, np.float32)
        given, total = jax.device_put(given, replicated(model.mesh)), 0
        for batch in tqdm(batches, desc="merged scores", unit="batch"):
            total = np.add(total, _in_float64(step(batch, given)))
        of_own, n_own, of_all, n_all = total
        return np.where(n_own > 0, of_own / np.maximum(n_own, 1), of_all / n_all)

    return mean_scores


def _in_float64(arrays):
    return [np.asarray(a, np.float64) for a in jax.device_get(arrays)]


def observing_step(model, observe):
    """A jitted forward pass `(host batch, given=None) -> the results of observe`, stacked by layer.

    `observe(ctx, chosen, scores, given)` is called in each layer with its `Context`, the choices
    `chosen [T, Z]` (1 or 0, 0 for padding), `scores [T, Z]`, and the layer's part of `given`,
    arrays with the axis of layers first.
    """

    def of_layer(scores, routing, weights, ctx):
        n = scores.shape[1]
        chosen = jnp.zeros((scores.shape[0], n + 1))
        chosen = chosen.at[routing.token, routing.expert].set(1)[:, :n]
        chosen = chosen * ctx.token_weights[:, None]
        return observe(ctx, chosen, scores, ctx.state.get(_GIVEN))

    decoder = model.decoder.clone(observe=of_layer)

    def observed(params, routing_state, batch, given):
        state = routing_state if given is None else routing_state | {_GIVEN: given}
        _, stats = features(decoder, params, state, batch, model.config.data.document_mask)
        return stats.records["observed"]

    compiled = jax.jit(observed, out_shardings=replicated(model.mesh))

    def step(batch, given=None):
        with jax.set_mesh(model.mesh):
            return compiled(model.params, model.routing_state, model.put(batch), given)

    return step


def _product(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _score_sums(ctx, chosen, scores, given):
    """The fields of `Moments` over the tokens of a batch."""
    devices, token_weights = ctx.devices, ctx.token_weights
    tokens, total = devices.total((token_weights.sum(), _product("t,tz->z", token_weights, scores)))
    mean = total / jnp.maximum(tokens, 1)
    centred = scores - mean
    scatter = _product("ty,tz->yz", centred * token_weights[:, None], centred)
    sums = devices.total((scatter, chosen.sum(axis=0), (chosen * scores).sum(axis=0)))
    return tokens, mean, *sums


def _merged_sums(ctx, chosen, scores, given):
    """Per merged expert: sums of its scores over its own tokens and over all, each with a count."""
    (w_gate_down, members), token_weights = given, ctx.token_weights
    own, norms = chosen @ members, scores_of_all(ctx.x, w_gate_down)
    of_all = _product("t,td->d", token_weights, norms)
    n_all = jnp.full_like(of_all, token_weights.sum())
    return ctx.devices.total(((own * norms).sum(axis=0), own.sum(axis=0), of_all, n_all))
