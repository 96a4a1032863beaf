"""`experts.kind="capacity"`: experts with room for a fixed number of tokens, as MoE in Flax since
GShard and Switch.

Tokens stand in groups, one a sequence. In each group an expert has C places (GShard, arXiv
2006.16668; Switch, arXiv 2101.03961): all first choices are placed before any second one, and
either in the order of the tokens. A choice that finds its expert full is dropped and adds nothing
to its token. Rows reach their experts, and their outputs the tokens, by products with tensors over
all tokens, experts and places, so that every shape is fixed and every step a product.

NOT CAUSAL for more than one expert per token: the first choice of a later token takes the place of
an earlier token's second. With one expert per token only earlier tokens of the group count.

G groups, T tokens of each, n experts, K chosen per token, C places, d model width, f expert width,
m experts of a device, H groups whose rows meet at a device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.experts.router import RouterLayer
from aoe_jax.experts.selection.expert_choice import expert_capacity
from aoe_jax.experts.swiglu import one_expert


class Places(NamedTuple):
    """Where the tokens of each group lie among the places of each expert."""

    place: (
        jax.Array
    )  # [G, T, n] int32, from 0 to C - 1; C: the expert has none for this token, or wasn't chosen
    weight: jax.Array  # [G, T, n] float32, of the chosen experts, 0 of others; it has a gradient
    dropped: jax.Array  # [G, T] float32, share of the K choices of a token that found no place


def capacity_assignment(expert, weight, n_experts, capacity):
    """Places for the choices of each group: first choices before second ones, then by the order of
    the tokens.

    Args:
      expert: `[G, T, K]` int32, the chosen experts, the first choice first; n: none, as for
        padding.
      weight: `[G, T, K]` float32.
      n_experts: n.
      capacity: C.

    Returns:
      `Places`.
    """
    groups, n_tokens, k = expert.shape
    chosen = jax.nn.one_hot(expert, n_experts, dtype=jnp.int32)
    by_rank = chosen.swapaxes(1, 2).reshape(groups, k * n_tokens, n_experts)
    before = (
        (jnp.cumsum(by_rank, axis=1) - by_rank)
        .reshape(groups, k, n_tokens, n_experts)
        .swapaxes(1, 2)
    )
    place = jnp.where(chosen > 0, jnp.minimum(before, capacity), capacity).min(axis=2)
    n_chosen, n_placed = chosen.sum(axis=(2, 3)), (place < capacity).sum(axis=2)
    return Places(place, (weight[..., None] * chosen).sum(axis=2), (n_chosen - n_placed) / k)


def dispatch_tensor(places, capacity, dtype):
    """`[G, T, n, C]`, 1 where a token lies at a place of an expert, else 0."""
    return (places.place[..., None] == jnp.arange(capacity)).astype(dtype)


def combine_tensor(places, dispatch):
    """`[G, T, n, C]`, the weight of the expert where `dispatch_tensor` is 1; it has a gradient."""
    return places.weight.astype(dispatch.dtype)[..., None] * dispatch


def capacity_experts(x, places, capacity, w, exchange=lambda rows, split, concatenate: rows):
    """SwiGLU experts on the tokens that have a place, weighed and added up by token.

    Args:
      x: `[G, T, d]`.
      places: `Places`.
      capacity: C.
      w: `w_g` and `w_p` `[m, d, f]`, `w_o` `[m, f, d]`, in the dtype of `x`.
      exchange: `(rows, split, concatenate)`: splits rows along one axis over the devices that share
        the experts, and concatenates what they send along another.

    Returns:
      `[G, T, d]`; zero for a token none of whose choices found a place.
    """
    with jax.named_scope("dispatch"):
        dispatch = dispatch_tensor(places, capacity, x.dtype)
        rows = exchange(jnp.einsum("gtnc,gtd->ngcd", dispatch, x), 0, 1)
    with jax.named_scope("experts"):
        of_expert = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        rows = one_expert(of_expert, w).reshape(rows.shape)
    with jax.named_scope("combine"):
        return jnp.einsum("gtnc,ngcd->gtd", combine_tensor(places, dispatch), exchange(rows, 1, 0))


class CapacityLayer(RouterLayer):
    """A router layer whose experts have room for a fixed number of tokens of each sequence.

    A group is the tokens along the axis before the last: sequences of `[B, S, d]`. Statistics and
      balance losses are of the
    router's choice, before anything is dropped, but for `dropped_share`; so is what loss-free
    balancing goes by.
    """

    not_by_token = "whether an expert has room for a token depends on other tokens of the text and on its length"
    padding_counts = True
    routing_note = "Choices of experts with a capacity are those before anything is dropped."

    @staticmethod
    def in_words(experts):
        """As in every layer."""
        return f"MoE, capacity {experts.capacity_factor:g}"

    @staticmethod
    def not_causal_because(experts):
        """As in every layer."""
        if experts.top_k == 1:
            return ""
        return (
            f"with experts.top_k={experts.top_k} the first choices of later tokens take the places of earlier tokens' other "
            "choices, and what is dropped says something of the future"
        )

    def pipeline(self, devices, x, given, scores, balance_scores, gate, weights):
        """The stations after scoring, arguments as in a router layer; the gate is whole.

        Raises:
          ValueError: tokens `[T, d]` on a mesh, of which each device would have a group of its own.
        """
        c, whole = self.config, devices.whole_sequences
        assignment, stats, per_token = self.select(given, scores, balance_scores)
        with jax.named_scope("select"):
            expert, weight = (
                a.reshape(-1, c.top_k) for a in (assignment.expert, assignment.weight)
            )
            expert = whole(
                jnp.where(given.token_weights[:, None] > 0, expert, c.n_experts)
            )  # padding takes no place
            n_places = expert_capacity(expert.shape[1], c.n_experts, c.capacity_factor * c.top_k)
            places = capacity_assignment(expert, whole(weight), c.n_experts, n_places)
        with jax.named_scope("balance"):
            of_own = places.dropped.sum() / devices.size(
                "tensor"
            )  # whose devices all have the same groups
            dropped, n_tokens = devices.total((of_own, given.token_weights.sum()))
            stats = stats._replace(dropped_share=dropped / jnp.maximum(n_tokens, 1))

        def experts(x, places, weights):
            with jax.named_scope("experts"):
                w = {
                    name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()
                }
            y = capacity_experts(whole(x), places, n_places, w, devices.exchange)
            return devices.sum_scatter(y, "tensor", 1).reshape(x.shape)

        return self.rematerialised(devices, experts)(x, places, weights), stats, per_token
