"""The scores and choices of a trained model's experts on tokens of a corpus.

L layers, T tokens, Z experts, d model width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.evaluation.models import Model
from aoe_jax.sharding import replicated
from aoe_jax.training.step import features


def observations(model: Model, batches: Iterable[dict], with_inputs=False):
    """Yields `(scores, chosen)` of the tokens of each host batch without padding, on the host.

    `scores [L, T, Z]` float32 are norms or router logits, and `chosen [L, T, Z]` bool depends on a
    selection bias too. `with_inputs` adds the inputs `x [L, T, d]` of the layers of experts.
    """

    def observe(scores, routing, weights, ctx):
        n_tokens, n = scores.shape
        chosen = jnp.zeros((n_tokens, n + 1), bool).at[routing.token, routing.expert].set(True)
        arrays = (scores, chosen[:, :n], ctx.x) if with_inputs else (scores, chosen[:, :n])
        return jax.tree.map(ctx.devices.all_tokens, arrays)

    decoder = model.decoder.clone(observe=observe)

    def observed(params, routing_state, batch):
        mask = model.config.data.document_mask
        return features(decoder, params, routing_state, batch, mask)[1].records["observed"]

    compiled = jax.jit(observed, out_shardings=replicated(model.mesh))
    for batch in tqdm(batches, "scores", unit="batch"):
        with jax.set_mesh(model.mesh):
            found = jax.device_get(compiled(model.params, model.routing_state, model.put(batch)))
        is_real = batch["segment_ids"].reshape(-1) > 0
        yield tuple(a[:, is_real] for a in found)


class Moments(NamedTuple):
    """Moments of scores over tokens, in float64."""

    tokens: int
    mean: np.ndarray  # [L, Z]
    gram: np.ndarray  # [L, Z, Z], sums over tokens of products of two experts' scores
    load: np.ndarray  # [L, Z], the share of the tokens that chose each expert

    @property
    def scatter(self):
        """`[L, Z, Z]`, the sums over tokens of products of centred scores."""
        return self.gram - self.tokens * self.mean[:, :, None] * self.mean[:, None, :]


def score_moments(model: Model, batches: Iterable[dict]) -> Moments:
    """The `Moments` of a model's scores on host batches; the scores of one batch are in memory."""
    tokens, total, gram, chosen = 0, 0, 0, 0
    for scores, is_chosen in observations(model, batches):
        scores = scores.astype(np.float64)
        tokens += scores.shape[1]
        total += scores.sum(axis=1)
        gram += scores.mT @ scores
        chosen += is_chosen.sum(axis=1)
    return Moments(tokens, total / tokens, gram, chosen / tokens)
