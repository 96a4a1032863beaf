"""What the select station gives to those after it: which expert processes which token.

T tokens, n experts, P slots, k slots of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Recomputing a top-k in the backward pass may break ties the other way: rematerialisation keeps
# what bears this name. The scores bear it too: they are [T, n] only, and keeping them saves scoring
# again.
SELECTION = "selection"


class Assignment(NamedTuple):
    """Which expert processes which token, and with what weight, as P flat slots.

    An unused slot has expert number n and weight 0. Token-choice methods lay their slots out token
    by token, an equal number for each (`slots_per_token`); `None` says that the order is arbitrary.
    """

    token: jax.Array  # [P] int32
    expert: jax.Array  # [P] int32
    weight: jax.Array  # [P] float32
    slots_per_token: int | None


def by_token(expert, weight):
    """An assignment from `expert [T, k]` and `weight [T, k]`."""
    n_tokens, k = expert.shape
    token = jnp.repeat(jnp.arange(n_tokens, dtype=jnp.int32), k)
    return Assignment(token, expert.reshape(-1), weight.reshape(-1), k)


def by_mask(chosen, weight):
    """An assignment from a mask `chosen [T, n]` and `weight [T, n]`, a slot for every token and
    expert.
    """
    n_experts = chosen.shape[1]
    expert = jnp.where(chosen, jnp.arange(n_experts, dtype=jnp.int32), n_experts)
    return by_token(expert, jnp.where(chosen, weight, 0))


def weigh_chosen(assignment, scores):
    """The same choice with weights from other scores: the softmax over each token's slots of
    `scores [P]`.
    """
    weight = jax.nn.softmax(scores.reshape(-1, assignment.slots_per_token))
    return assignment._replace(weight=weight.reshape(-1))
