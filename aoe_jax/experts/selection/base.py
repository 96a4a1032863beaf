"""What a selection method is: a subclass of `Selection` in a file of its own, registered in
`selection/__init__.py`.

Nothing else knows its name: layers ask it to choose, the train step for its losses and its next
state, and whoever needs to know (decoding, FLOP counts, plans) for its traits.

t tokens of a device, T tokens of the batch, n experts, d model width, L layers.
"""

from typing import Any, NamedTuple

import jax

from aoe_jax.config import BalanceConfig, Config, ExpertsConfig
from aoe_jax.experts.selection.assignment import Assignment


class Given(NamedTuple):
    """What a selection may look at beside the scores of a layer."""

    devices: Any  # `parallel.Devices`: what tokens of other devices are needed for goes through it
    token_weights: (
        jax.Array
    )  # [t], 1 for a token that counts, 0 for padding, which must take nothing from other tokens
    settings: Any  # the configuration group of the method, where it has one
    state: dict[
        str, jax.Array
    ]  # of this layer, what isn't a parameter: see `Selection.initial_state`
    parameters: dict[str, jax.Array]  # of this layer: see `Selection.parameters`
    x: jax.Array  # [t, d], the tokens that were scored
    key: (
        jax.Array | None
    )  # for random draws, the same on all devices; None where the model isn't trained
    training: bool
    # [t, H] float32 for methods with `needs_attention`: of each head of the attention before the
    # experts, how much of its attention the token pays to one token, 0 to all alike and 1 to one
    # alone, see `model.attention.concentration`.
    attention: jax.Array | None = None
    number: jax.Array | int | None = (
        None  # of the layer in its model; for kinds of layer with `needs_place`
    )
    positions: jax.Array | None = None  # [t] int32, in their sequences; likewise


class Choice(NamedTuple):
    """What a selection says of a layer's tokens."""

    assignment: Assignment
    # What `losses` and `next_state` go by beside `LayerStats`: arrays that are the same on all
    # devices (sums over tokens go through `Devices.total`), with their gradients. All selections of
    # a method have the same names.
    records: dict[str, jax.Array] | None = None
    per_token: dict[str, jax.Array] | None = None  # [t]: as records, a value for every token
    live: jax.Array | None = None  # [n], see `LayerStats`


class Selection:
    """A selection method: no state of its own, its functions are pure."""

    fields: tuple[str, ...] = ()  # of `top_k` and `gate` in `ExpertsConfig`, those that it goes by
    causal = True  # whether the experts of a token depend on no later token, nor on other sequences
    not_causal_because = ""  # the end of "for ..."
    balances_by = (
        ""  # what keeps the load even beside the group `balance`, in words, such as "its own loss"
    )
    needs_key = False  # whether it draws at random in training
    needs_attention = False  # whether it goes by the attention that a token pays, `Given.attention`
    # Of `Choice.records`, shares of the tokens, without a gradient: losses have those of all
    # micro-batches of a step so far.
    shares: tuple[str, ...] = ()
    all_slots_used = False  # whether every slot of every assignment is in use
    # Whether scores are wanted that lie around 0 and have the scale neither of tokens nor of
    # weights: cosines of tokens and router columns, or norms by what they would be for random
    # directions, see `scoring.relative_norms`.
    relative_scores = False

    def experts_per_token(self, experts: ExpertsConfig) -> float | None:
        """Mean number of experts that process a token, or None where the scores decide it."""
        return None

    def not_causal_until(self, settings) -> int:
        """The first step of training in which it is causal, for one that isn't at the beginning."""
        return 0

    def parameters(self, experts: ExpertsConfig, settings) -> dict[str, tuple]:
        """name -> `(initializer, shape)` of the parameters that a layer has for it; their names are
        in `PARAMETER_AXES`.
        """
        return {}

    def initial_state(
        self, experts: ExpertsConfig, balance: BalanceConfig, settings, d
    ) -> dict[str, jax.Array]:
        """name -> array of one layer: what training changes by other means than gradients. Saved
        with the model.
        """
        return {}

    def choose(self, experts: ExpertsConfig, scores, given: Given) -> Choice:
        """The choice for `scores [t, n]` float32, norms or logits."""
        raise NotImplementedError

    def losses(
        self, config: Config, stats, per_token, state, token_weights, weights
    ) -> dict[str, tuple]:
        """The losses of the method, for the whole model.

        Args:
          config: of the run.
          stats: `LayerStats` stacked over layers, `records` among them; `load` and `shares` of all
            micro-batches so far.
          per_token: `Choice.per_token` stacked, `[L, B, S]`.
          state: the state before the step, stacked `[L, ...]`.
          token_weights: `[B, S]`, 0 for padding.
          weights: the parameters of the layers of experts by name, stacked.

        Returns:
          name -> `(weight, value)`, scalars: each value is reported by its name, and its multiple
          added to the loss.
        """
        return {}

    def next_state(self, config: Config, state, stats) -> dict[str, jax.Array]:
        """The state after a step, stacked `[L, ...]` like `state`; `stats`: `LayerStats` of the
        step, stacked.
        """
        return state

    def next_parameters(self, config: Config, weights, state, stats) -> dict[str, jax.Array]:
        """Parameters of the layers of experts that a step changes by other means than gradients, of
        methods with a state.

        Args:
          config: of the run.
          weights: the parameters after the optimiser's update, by name, stacked `[L, ...]`.
          state: the state before the step, as in `next_state`.
          stats: as in `next_state`.

        Returns:
          name -> the new array, of those that the method changes. The optimiser's moments stay as
          they are.
        """
        return {}
