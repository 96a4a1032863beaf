"""Finds neurons of a router MoE's experts whose activations predict the router's choices.

Notation: L layers, T tokens, n experts, d model width, f expert width, r scoring columns. A neuron
is a column of w_gate and w_up and a row of w_down. The order of neurons does not affect the output.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.moe.scoring import SCORE_OF_CODE, scores_of_all

# Name of a score -> (score of no neurons, function that adds one neuron's activation to a score).
_GROWING = {
    "norm": (0.0, lambda score, gate: jnp.sqrt(score * score + gate * gate)),
    "max": (-jnp.inf, jnp.maximum),
}


@partial(jax.jit, static_argnames=("count", "score"))
def telling_neurons(x, logits, chosen, w_gate, count, score):
    """Chooses `count` neurons per expert so that their scores predict the router's choices best.

    One neuron is added to each expert in turn, until each has `count`. An expert's first neuron is
    the one whose score correlates best with the expert's logit minus the mean logit of all experts.
    Each further neuron is the one that most increases the log-likelihood of the router's choices
    under a softmax over the experts' scores, `sum_ti chosen_ti log softmax(scores_t)_i`. All gate
    pre-activations, `[n, T, f]` float32, are in memory at once.

    `x [T, d]`, `logits [T, n]` and `chosen [T, n]` are the router's inputs, logits and choices in a
    layer, and `w_gate` is `[n, d, f]`. `score` is "norm" or "max", `count` is at most f. Returns
    `[n, count]` int32, in the order of choice.
    """
    gate = jnp.einsum("td,ndf->ntf", x.astype(jnp.float32), w_gate.astype(jnp.float32))
    (n, n_tokens, f), n_chosen = gate.shape, chosen.sum(axis=1)
    empty, grow = _GROWING[score]
    centred = logits - logits.mean(axis=1, keepdims=True)

    def correlation(own, expert, scores):
        weight = (n_chosen > 0) / (n_chosen > 0).sum()
        own = own - weight @ own
        deviation = jnp.sqrt(weight @ jnp.square(own))
        return (weight * centred[:, expert]) @ own / jnp.maximum(deviation, 1e-20)

    def likelihood(own, expert, scores):
        others = jax.nn.logsumexp(scores.at[:, expert].set(-jnp.inf), axis=1)
        return chosen[:, expert] @ own - n_chosen @ jnp.logaddexp(others[:, None], own)

    def add_neuron(step, state):
        scores, is_free, neurons = state
        place, expert = step // n, step % n
        own = grow(scores[:, expert, None], gate[expert])
        gain = jax.lax.cond(place == 0, correlation, likelihood, own, expert, scores)
        best = jnp.argmax(jnp.where(is_free[expert], gain, -jnp.inf))
        return (
            scores.at[:, expert].set(own[:, best]),
            is_free.at[expert, best].set(False),
            neurons.at[expert, place].set(best),
        )

    state = jnp.full((n_tokens, n), empty), jnp.ones((n, f), bool), jnp.zeros((n, count), int)
    return jax.lax.fori_loop(0, n * count, add_neuron, state)[2]


def in_front(neurons, width):
    """Returns the order `[width]` of an expert's neurons that begins with `neurons [count]`."""
    return np.concatenate([neurons, np.setdiff1d(np.arange(width), neurons)])


def agreement(observed, w_score, score):
    """Computes the fraction of the router's choices that the neurons' scores would make too.

    `observed` has `logits [L, T, n]`, `chosen [L, T, n]` and `x [L, T, d]` of a router MoE. Scores
    are `SCORE_OF_CODE[score]` of `x w_score`, with `w_score [L, n, d, r]`. A token gets as many
    experts as the router chose. Returns `(fractions [L], expected fraction of a random choice)`.
    """
    _, chosen, x = observed
    of_layers = [
        scores_of_all(*layer, SCORE_OF_CODE[score]) for layer in zip(x, w_score, strict=True)
    ]
    rank = np.argsort(np.argsort(-np.stack(of_layers), axis=-1, kind="stable"), axis=-1)
    counts = chosen.sum(axis=-1)
    agreed = (chosen & (rank < counts[..., None])).sum(axis=(1, 2))
    by_chance = (counts**2).sum() / chosen.shape[-1] / counts.sum()
    return agreed / counts.sum(axis=1), float(by_chance)
