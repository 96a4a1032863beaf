"""What pruning needs to know of scores, batch by batch: means, second moments and choices, never
the scores themselves.

L layers, Z experts, D merged ones, t tokens of a device, d model width, r low rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.evaluation.models import Model
from aoe_jax.experts import scoring
from aoe_jax.model.decoder import Decoder, DecoderLayer
from aoe_jax.sharding import replicated

GIVEN = "given"  # beside the routing state, what `observe` of a layer gets


class _Sums(NamedTuple):
    """Of one batch, float32, stacked over layers."""

    tokens: jax.Array  # []
    mean: jax.Array  # [Z]
    scatter: jax.Array  # [Z, Z]
    chosen: jax.Array  # [Z]
    chosen_score: jax.Array  # [Z]


@dataclass(frozen=True)
class Moments:
    """Scores of Z experts over tokens, in float64; arrays have the axis of layers first."""

    tokens: float
    mean: np.ndarray  # [L, Z], of the scores: norms, or router logits
    scatter: np.ndarray  # [L, Z, Z], sums over tokens of products of scores less their means
    chosen: np.ndarray  # [L, Z], how many tokens chose each expert
    chosen_score: np.ndarray  # [L, Z], the sum of an expert's scores over the tokens that chose it

    @property
    def gram(self):
        """`[L, Z, Z]`, sums of products of the scores themselves."""
        return self.scatter + self.tokens * self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def load(self):
        """`[L, Z]`, the share of the tokens that chose each expert."""
        return self.chosen / self.tokens

    def plus(self, other: "Moments"):
        """Of the tokens of both (Chan et al. 1979): nothing is lost where means are large beside
        what lies about them.
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
    """The `Moments` of a model's scores over the tokens of host batches; one forward pass.

    Memory holds `[L, Z, Z]` numbers of a batch and of all. The model chooses as it does, by its
    selection bias too.
    """
    step = _passing(model, _score_sums)
    found = None
    for batch in tqdm(batches, desc="scores", unit="batch"):
        sums = jax.device_get(step(batch, None))
        tokens, *of_experts = (np.asarray(a, np.float64) for a in sums)
        of_batch = Moments(float(tokens[0]), *of_experts)
        found = of_batch if found is None else found.plus(of_batch)
    return found


class MergedScores:
    """The mean scores that merged AoE experts would have where the model computes what it did;
    compiled once.
    """

    def __init__(self, model: Model, batches: Iterable[dict]):
        """Takes the model before pruning, and the host batches that `Moments` are of."""
        self._mesh, self._batches, self._step = model.mesh, batches, _passing(model, _merged_sums)

    def __call__(self, w_down, members) -> np.ndarray:
        """One forward pass.

        Args:
          w_down: `[L, D, d, r]` of the merged experts.
          members: `[L, Z, D]`, 1 where an expert is merged into one, else 0.

        Returns:
          `[L, D]` float64: the mean over the tokens of each merged expert, those that chose a
          member of it, once for each member that they chose; or over all tokens where none did.
        """
        merged = jax.device_put((w_down, np.asarray(members, np.float32)), replicated(self._mesh))
        total = None
        for batch in tqdm(self._batches, desc="merged scores", unit="batch"):
            sums = [np.asarray(a, np.float64) for a in jax.device_get(self._step(batch, merged))]
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
        of_own, n_own, of_all, n_all = total
        return np.where(n_own > 0, of_own / np.maximum(n_own, 1), of_all / n_all[:, None])


def _passing(model, observe):
    """`(host batch, arrays with the axis of layers first) -> what `observe` returns of each layer`."""
    decoder, document_mask = _observed(model.decoder, observe), model.config.data.document_mask

    def features(params, routing_state, batch, given):
        segment_ids = batch["segment_ids"] if document_mask else None
        token_weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        state = routing_state if given is None else routing_state | {GIVEN: given}
        _, observed = decoder.apply(
            {"params": params},
            batch["inputs"],
            segment_ids,
            token_weights,
            state,
            method="features",
        )
        return observed

    compiled = jax.jit(features, out_shardings=replicated(model.mesh))

    def step(batch, given):
        with jax.set_mesh(model.mesh):
            return compiled(model.params, model.routing_state, model.put(batch), given)

    return step


def _observed(decoder: Decoder, observe):
    """The same decoder; layers find what they are given in their routing state, and have `observe`
    make their statistics.
    """

    class Layer(DecoderLayer):
        def make_experts(self, kind, **settings):
            return super().make_experts(_observing(kind, observe), **settings)

    class Observed(Decoder):
        pass

    Observed.Layer = Layer
    return Observed(
        decoder.model, decoder.experts, decoder.balance, decoder.transport, decoder.settings
    )


def _observing(kind, observe):
    class Observing(kind):
        def pipeline(self, devices, x, given, scores, balance_scores, gate, weights):
            """As in the layer."""
            assignment = self.method.choose(self.config, scores, given).assignment
            n, token_weights = scores.shape[1], given.token_weights
            chosen = (
                jnp.zeros((x.shape[0], n + 1)).at[assignment.token, assignment.expert].set(1)[:, :n]
            )
            y, _, _ = super().pipeline(devices, x, given, scores, balance_scores, gate, weights)
            chosen = chosen * token_weights[:, None]
            return (
                y,
                observe(devices, x, token_weights, chosen, scores, given.state.get(GIVEN)),
                None,
            )

    return Observing


def _product(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _score_sums(devices, x, token_weights, chosen, scores, given):
    """`scores [t, Z]` and `chosen [t, Z]`, 1 or 0, -> `_Sums`."""
    tokens, total = devices.total((token_weights.sum(), _product("t,tz->z", token_weights, scores)))
    mean = total / jnp.maximum(tokens, 1)
    centred = scores - mean
    scatter = _product("ty,tz->yz", centred * token_weights[:, None], centred)
    return _Sums(
        tokens, mean, *devices.total((scatter, chosen.sum(axis=0), (chosen * scores).sum(axis=0)))
    )


def _merged_sums(devices, x, token_weights, chosen, scores, given):
    """`given`: `w_down [D, d, r]`, `members [Z, D]` -> sums of scores of their own tokens `[D]` and
    of all, and counts.
    """
    w_down, members = given
    own, norms = chosen @ members, scoring.norms(x, w_down)
    of_all = _product("t,td->d", token_weights, norms)
    return devices.total(((own * norms).sum(axis=0), own.sum(axis=0), of_all, token_weights.sum()))
