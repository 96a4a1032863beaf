"""Text from a model: prompts are read at once, then tokens are drawn one by one in a compiled loop.

B sequences, V vocabulary, N tokens of a chunk.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from aoe_jax.errors import UserError
from aoe_jax.evaluation.contrast import Contrast, contrasted, strong_and_weak
from aoe_jax.evaluation.models import Model
from aoe_jax.model.decoding import Cache, check_decodes, extend, output_logits, prefill
from aoe_jax.sharding import RULES, replicated

LENGTH_MULTIPLE = 64  # of prompts and caches, so that few shapes are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # of the softmax; 0: the likeliest token
    top_k: int | None = None  # of the likeliest tokens only
    top_p: float | None = (
        None  # of the fewest likeliest tokens whose probability reaches it (arXiv 1904.09751)
    )

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature={self.temperature}: must be 0 (the likeliest token) or greater"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k={self.top_k}: must be 1 or greater")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: must lie between 0 and 1")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise UserError(
                "--temperature=0 takes the likeliest token: leave --top_k and --top_p out"
            )


def draw(logits, keys, sampling: Sampling):
    """The next token of each sequence: `logits [B, V]`, `keys [B]` -> `[B]` int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    order = jnp.argsort(logits, axis=-1, descending=True)
    rank = jnp.argsort(order, axis=-1)  # so that of equal ones the first go before
    if sampling.top_k is not None:
        logits = jnp.where(rank < sampling.top_k, logits, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        n_kept = jnp.sum(
            jnp.cumsum(probability, axis=-1) - probability < sampling.top_p, axis=-1, keepdims=True
        )
        logits = jnp.where(rank < n_kept, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


class Generator:
    """Continues texts."""

    def __init__(self, model: Model, contrast: Contrast | None = None):
        """Takes a model, and what its logits are contrasted with, if with anything.

        Raises:
          UserError: the selection is no token choice, or none that can be contrasted.
        """
        check_decodes(model.decoder)
        self._model = model
        self._params = model.by_layer
        decoders = (
            (model.decoder,) if contrast is None else strong_and_weak(model.decoder, contrast)
        )
        self._prefill = jax.jit(partial(_prefill, decoders, contrast), static_argnames="places")
        self._decode = jax.jit(
            partial(_decode, decoders, contrast, model.tokenizer.end_of_text),
            static_argnames=("sampling", "n_tokens"),
            donate_argnames="state",
            out_shardings=(replicated(model.mesh), replicated(model.mesh), None),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int], **settings
    ) -> list[list[int]]:
        """The continuations of prompts; as in `stream`, whole."""
        continuations = [[] for _ in prompts]
        for chunk in self.stream(prompts, max_tokens, **settings):
            for continuation, tokens in zip(continuations, chunk, strict=True):
                continuation.extend(tokens)
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        sampling: Sampling = Sampling(temperature=0.0),
        seed: int = 0,
        chunk: int = 16,
        is_done: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Continues prompts, as one batch.

        A continuation ends with the end-of-text token, which is not part of it, after `max_tokens`,
        or where `is_done` says so. What is drawn depends on the seed, the prompt and its place
        among the prompts, not on the other prompts.

        Args:
          prompts: token ids of each, at least one.
          max_tokens: for all, or of each.
          sampling: how tokens are drawn.
          seed: of the draws.
          chunk: tokens between two looks at what has come: the compiled loop runs that far.
          is_done: gets the number of a prompt and its continuation so far, after each chunk.

        Yields:
          The next tokens of each prompt, none of those that have ended.

        Raises:
          UserError: a prompt is empty, or it and its tokens are longer than the model's length.
        """
        limits = np.broadcast_to(np.asarray(max_tokens), len(prompts)).copy()
        self._check(prompts, limits)
        if not len(prompts):
            return
        so_far = [[] for _ in prompts]
        with jax.set_mesh(self._model.mesh):
            state = self._begin(prompts, limits, seed)
        while True:
            with jax.set_mesh(self._model.mesh):
                tokens, left, state = self._decode(
                    self._params,
                    self._model.routing_state,
                    state,
                    sampling=sampling,
                    n_tokens=chunk,
                )
            new = [row[row >= 0].tolist() for row in np.asarray(tokens)[: len(prompts)]]
            for row, more in zip(so_far, new, strict=True):
                row.extend(more)
            yield new
            left = np.array(left)
            if is_done:
                left[: len(prompts)] *= [
                    not is_done(number, row) for number, row in enumerate(so_far)
                ]
            if not left.any():
                return
            state = state._replace(left=self._put(left))

    def _check(self, prompts, limits):
        longest = self._model.config.model.max_len
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt):
                raise UserError(
                    f"prompt {number} is empty; begin a text with the token {self._model.start}"
                )
            if len(prompt) + limit > longest:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; with {limit} more it is longer than the model's length, "
                    f"model.max_len={longest}"
                )

    def _begin(self, prompts, limits, seed):
        """The state after the prompts: with rows that the mesh divides, and lengths of which there
        are few.
        """
        config = self._model.config
        shards = config.mesh.data * config.mesh.fsdp * config.mesh.expert
        n_rows = -(-len(prompts) // shards) * shards
        lengths = np.ones(n_rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        tokens = np.zeros((n_rows, _rounded(lengths.max())), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        left = np.zeros(n_rows, np.int32)
        left[: len(prompts)] = limits
        places = _rounded(int((lengths + left).max()))
        logits, caches = self._prefill(
            self._params,
            self._model.routing_state,
            self._put(tokens),
            self._put(lengths),
            places=places,
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), self._put(np.arange(n_rows))
        )
        return State(logits, caches, self._put(left), keys)

    def _put(self, a):
        sharding = NamedSharding(self._model.mesh, RULES.spec("batch"))
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


class State(NamedTuple):
    """Between two tokens."""

    logits: jax.Array  # [B, V] float32, of the next token
    caches: tuple[Cache, ...]  # of each decoder, all of equal lengths
    left: jax.Array  # [B] int32, tokens to come at most
    keys: jax.Array  # [B], of each sequence's draws


def _prefill(decoders, contrast, params, routing_state, tokens, length, places):
    """`(logits [B, V] float32, caches)` after prompts, as in `decoding.prefill`."""
    logits, caches = zip(
        *(prefill(decoder, params, routing_state, tokens, length, places) for decoder in decoders),
        strict=True,
    )
    return _joined(logits, contrast), caches


def next_logits(decoders, contrast, params, routing_state, token, caches):
    """Reads a token of each sequence.

    Args:
      decoders: one, or those of `strong_and_weak`.
      contrast: of two decoders, else None.
      params: `decoding.unstacked`.
      routing_state: of the selection method, arrays `[L, ...]` by name.
      token: `[B]` int32.
      caches: of each decoder a `Cache` with a free place.

    Returns:
      `(logits, caches)`: `[B, V]` float32 of the next token, and the caches with this one in them.
    """
    hidden, caches = zip(
        *(
            extend(decoder, params, routing_state, token[:, None], cache)
            for decoder, cache in zip(decoders, caches, strict=True)
        ),
        strict=True,
    )
    return _joined([output_logits(params, h)[:, 0] for h in hidden], contrast), caches


def _joined(logits, contrast):
    """The logits that tokens are drawn by, of those of each decoder."""
    return logits[0] if contrast is None else contrasted(*logits, contrast)


def _decode(decoders, contrast, end_of_text, params, routing_state, state, sampling, n_tokens):
    """Up to N tokens: `(tokens [B, N] int32 with -1 where there is none, left [B], state)`."""

    def is_needed(carry):
        count, _, state = carry
        return (count < n_tokens) & (state.left > 0).any()

    def one(carry):
        count, tokens, state = carry
        length = state.caches[0].length
        token = draw(state.logits, jax.vmap(jax.random.fold_in)(state.keys, length), sampling)
        is_active = (state.left > 0) & (token != end_of_text)
        tokens = tokens.at[:, count].set(jnp.where(is_active, token, -1))
        logits, caches = next_logits(decoders, contrast, params, routing_state, token, state.caches)
        length = jnp.where(is_active, caches[0].length, length)
        caches = tuple(cache._replace(length=length) for cache in caches)
        left = jnp.where(is_active, state.left - 1, 0)
        return count + 1, tokens, State(logits, caches, left, state.keys)

    tokens = jnp.full((state.left.shape[0], n_tokens), -1, jnp.int32)
    _, tokens, state = jax.lax.while_loop(is_needed, one, (0, tokens, state))
    return tokens, state.left, state


def _rounded(length):
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
