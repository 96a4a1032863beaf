"""Expert Threshold routing (Sun et al., arXiv 2603.11535): a token goes to every expert whose
threshold it passes.

    token t goes to expert i where score[t, i] > c[i];  weight = sigmoid(score[t, i]), not normalised
    c[i] <- decay c[i] + (1 - decay) (the k-th largest score of expert i in the batch),  k = T K / n

Tokens decide by the thresholds of before the step, so each by itself: causal, in training and at
inference, and a token may have any number of experts, K of them on average. For the first
`threshold.warmup_steps` steps experts choose their k tokens instead (expert choice), which isn't
causal, while the thresholds settle.

Faithful to the paper's text but for: no shared expert, no bound on the tokens of an expert (nothing
is dropped), and the first threshold is that of the first batch. Of micro-batches
(`train.accumulate`) each is a batch of its own: experts choose among its tokens in the warm-up, and
thresholds move by the mean of the micro-batches' k-th largest scores. Norms are never negative, so
their sigmoid is never below 1/2: `threshold.weights="relative"` takes that of the score less the
threshold, this project's reading for AoE. No balance loss is needed. Costs a top-k over the tokens
of the batch for each expert, in training, and n slots a token, in use or not.

T tokens of the batch, t of this device, n experts, K = `experts.top_k`.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, by_mask
from aoe_jax.experts.selection.base import Choice, Selection


def above_thresholds(scores, thresholds):
    """Which experts process which token: `scores [t, n]`, `thresholds [n]` -> `[t, n]` bool."""
    return jax.lax.stop_gradient(scores) > thresholds


def kth_largest(scores, token_weights, share):
    """Of each expert the score that a `share` of the tokens reach: `scores [T, n]`, `token_weights
    [T]` -> `[n]`.

    Of t tokens that count it is that of the `ceil(share t)`-th; -inf where none does.
    """
    n_tokens = scores.shape[0]
    real = jnp.where(token_weights[:, None] > 0, scores, -jnp.inf)
    largest = jax.lax.top_k(real.T, min(n_tokens, math.ceil(share * n_tokens)))[0]
    k = jnp.ceil(share * (token_weights > 0).sum() - 1e-4).astype(jnp.int32)
    return largest[:, jnp.clip(k, 1, largest.shape[1]) - 1]


class Threshold(Selection):
    """`experts.selection="threshold"`: state `threshold [n]`, and `updates []`, the steps it has
    seen.
    """

    fields = ("top_k",)
    balances_by = "thresholds"
    not_causal_because = "experts choose tokens while thresholds settle (`threshold.warmup_steps`)"

    def not_causal_until(self, settings):
        """The end of the warm-up."""
        return settings.warmup_steps

    def experts_per_token(self, experts):
        """K, on average."""
        return experts.top_k

    def initial_state(self, experts, balance, settings, d):
        """As in `Selection`."""
        return {"threshold": jnp.zeros(experts.n_experts), "updates": jnp.zeros(())}

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        thresholds, devices = given.state["threshold"], given.devices
        chosen, records = above_thresholds(scores, thresholds), None
        if given.training:
            whole = (
                devices.all_tokens(jax.lax.stop_gradient(scores)),
                devices.all_tokens(given.token_weights),
            )
            records = {"kth_largest": kth_largest(*whole, experts.top_k / experts.n_experts)}
            of_experts = jax.lax.stop_gradient(scores) >= records["kth_largest"]
            chosen = jnp.where(
                given.state["updates"] < given.settings.warmup_steps, of_experts, chosen
            )
        chosen = checkpoint_name(chosen & (given.token_weights[:, None] > 0), SELECTION)
        relative = given.settings.weights == "relative"
        weight = jax.nn.sigmoid(scores - thresholds if relative else scores)
        return Choice(by_mask(chosen, weight), records)

    def next_state(self, config, state, stats):
        """As in `Selection`."""
        decay, updates = config.threshold.decay, state["updates"]
        kept = jnp.where(updates == 0, 0, decay)[:, None]
        found = stats.records["kth_largest"]
        found_any = jnp.isfinite(found).all(axis=1)  # a batch without tokens says nothing
        threshold = kept * state["threshold"] + (1 - kept) * found
        threshold = jnp.where(found_any[:, None], threshold, state["threshold"])
        return {"threshold": threshold, "updates": updates + found_any}
