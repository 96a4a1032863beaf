"""Generates text: processes the prompts in one pass, then draws tokens in a compiled loop.

In shapes, B is the number of sequences, V the vocabulary size, N the number of tokens of a chunk.
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

from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import UserError, naming
from aoe_jax.evaluation.contrast import contrasted, weak_pass
from aoe_jax.evaluation.models import Model, multiple
from aoe_jax.model.decoder import Decoder
from aoe_jax.model.decoding import Cache, check_decodes, extend, output_logits, prefill, unstacked
from aoe_jax.sharding import replicated, spec_of

LENGTH_MULTIPLE = 64  # prompts and caches are padded to multiples of 64, to compile few shapes


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int | None = None  # draw only among the k likeliest tokens; None: all
    top_p: float | None = None  # nucleus sampling with this probability mass (arXiv 1904.09751)


def draw(logits, keys, sampling: Sampling):
    """Draws the next token of each sequence: `logits [B, V]`, `keys [B]` -> `[B]` int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = jax.lax.top_k(logits / sampling.temperature, count)
    if sampling.top_p is not None:
        probability = jax.nn.softmax(logits)
        before = jnp.cumsum(probability, axis=-1) - probability
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


class _State(NamedTuple):
    logits: jax.Array  # [B, V] float32, the logits of the next token
    caches: tuple[Cache, ...]  # one for each decoder; all have equal lengths
    keys: jax.Array  # [B], one random key for each sequence


class Generator:
    """Continues prompts with tokens that a model generates."""

    def __init__(self, model: Model, contrast: float | None = None):
        """`contrast` is beta of self-contrast; None turns it off. Raises `UserError` if the model
        does not support incremental decoding or self-contrast.
        """
        check_decodes(model.decoder)
        self._model = model
        decoders = (model.decoder,)
        if contrast is not None:
            decoders += (weak_pass(model.decoder),)
        self._begin = jax.jit(partial(_begin, decoders, contrast), static_argnames="places")
        self._decode = jax.jit(
            partial(_decode, decoders, contrast, model.ends),
            static_argnames=("sampling", "n_tokens"),
            donate_argnames="state",
            out_shardings=(replicated(model.mesh), replicated(model.mesh), None),
        )

    def generate(self, prompts, max_tokens, **settings) -> list[list[int]]:
        """Returns the complete continuations of prompts; the arguments are those of `stream`."""
        so_far = [[[] for _ in prompts], *self.stream(prompts, max_tokens, **settings)]
        return so_far[-1]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling = Sampling(temperature=0.0),
        seed: int = 0,
        chunk: int = 16,
        is_done: Callable[[list[int]], bool] | None = None,
        weights: tuple | None = None,
    ) -> Iterator[list[list[int]]]:
        """Continues prompts of token ids; after each chunk, yields the tokens of all continuations.

        A continuation ends before a token of `Model.ends`, after `max_tokens` tokens, or after a
        chunk for which `is_done(continuation so far)` is true. Draws depend on the seed, the prompt
        and its index in `prompts`, but not on the other prompts. `weights` replace those of the
        model; they are the result of `unstacked` and a routing state. Raises `UserError` if a
        prompt is empty, or if a prompt and `max_tokens` together exceed `model.max_len`.
        """
        if not prompts:
            return
        longest = self._model.config.model.max_len
        for number, prompt in enumerate(prompts):
            if len(prompt) + max_tokens > longest:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; with {max_tokens} more it is "
                    f"longer than the model's length, model.max_len={longest}"
                )
            if not prompt:
                wanted = f"begin a text with the token {self._model.start}"
                raise UserError(f"prompt {number} is empty; {wanted}")
        # Padding rows keep the number of compiled shapes small, and let the mesh split the batch.
        n_rows = 2 ** math.ceil(math.log2(len(prompts)))
        n_rows = multiple(n_rows, self._model.config.mesh.batch_shards)
        lengths, left = np.ones(n_rows, np.int32), np.zeros(n_rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        left[: len(prompts)] = max_tokens
        tokens = np.zeros((n_rows, multiple(int(lengths.max()), LENGTH_MULTIPLE)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        places = multiple(int(lengths.max()) + max_tokens, LENGTH_MULTIPLE)
        arrays = map(self._put, (tokens, lengths, np.arange(n_rows)))
        weights = weights or (self._model.by_layer, self._model.routing_state)
        with jax.set_mesh(self._model.mesh):
            state = self._begin(*weights, *arrays, jax.random.key(seed), places=places)
        so_far, settings = [[] for _ in prompts], {"sampling": sampling, "n_tokens": chunk}
        while left.any():
            left = self._put(left)
            with jax.set_mesh(self._model.mesh):
                drawn, left, state = self._decode(*weights, left, state, **settings)
            for row, more in zip(so_far, np.asarray(drawn), strict=False):
                row += more[more >= 0].tolist()
            yield so_far
            left = np.array(left)
            if is_done:
                left[: len(prompts)] *= [not is_done(row) for row in so_far]

    def _put(self, a):
        sharding = NamedSharding(self._model.mesh, spec_of("batch"))
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


def _begin(decoders, contrast, params, routing_state, tokens, lengths, rows, key, places):
    """Fills the caches with the prompts and returns the state; each row gets its own key."""
    results = [prefill(d, params, routing_state, tokens, lengths, places) for d in decoders]
    logits, caches = zip(*results, strict=True)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return _State(_joined(logits, contrast), caches, keys)


def next_logits(decoders, contrast, params, routing_state, token, caches):
    """Processes one token of each sequence with one decoder, or with the two of self-contrast.

    `params` is the result of `decoding.unstacked`, `token` is `[B]` int32. No cache may be full.
    Returns the logits `[B, V]` float32 of the next token, and the caches extended by `token`.
    """
    results = [
        extend(decoder, params, routing_state, token[:, None], cache)
        for decoder, cache in zip(decoders, caches, strict=True)
    ]
    logits = [output_logits(params, hidden)[:, 0] for hidden, _ in results]
    return _joined(logits, contrast), tuple(cache for _, cache in results)


def _joined(logits, contrast):
    return logits[0] if contrast is None else contrasted(*logits, contrast)


def _decode(decoders, contrast, ends, params, routing_state, left, state, sampling, n_tokens):
    """Draws up to N tokens per sequence. Returns `(tokens, left, state)`: `tokens [B, N]` int32 are
    -1 after the end, and `left [B]` int32 is the number of tokens that each sequence may still get.
    """

    def is_needed(carry):
        count, _, left, _ = carry
        return (count < n_tokens) & (left > 0).any()

    def one(carry):
        count, tokens, left, state = carry
        length = state.caches[0].length
        token = draw(state.logits, jax.vmap(jax.random.fold_in)(state.keys, length), sampling)
        is_active = (left > 0) & ~jnp.isin(token, jnp.array(ends))
        tokens = tokens.at[:, count].set(jnp.where(is_active, token, -1))
        logits, caches = next_logits(decoders, contrast, params, routing_state, token, state.caches)
        length = jnp.where(is_active, caches[0].length, length)
        caches = tuple(cache._replace(length=length) for cache in caches)
        left = jnp.where(is_active, left - 1, 0)
        return count + 1, tokens, left, _State(logits, caches, state.keys)

    tokens = jnp.full((left.shape[0], n_tokens), -1, jnp.int32)
    return jax.lax.while_loop(is_needed, one, (0, tokens, left, state))[1:]


def continuations(model: Model, prompts, max_tokens, contrast=None, **settings):
    """After each chunk, yields the texts generated so far, without incomplete characters.

    `model` and `contrast` are passed to `Generator`, and the other arguments to its `stream`.
    """
    tokenizer = model.tokenizer
    rows = [[model.start, *tokens.tolist()] for tokens in tokenizer.encode(prompts)]
    # Prompt and continuation are decoded together, because some tokenizers drop a leading blank.
    heads = [tokenizer.decode(row) for row in rows]
    for so_far in Generator(model, contrast).stream(rows, max_tokens, **settings):
        texts = (tokenizer.decode(row + tokens) for row, tokens in zip(rows, so_far, strict=True))
        pairs = zip(heads, texts, strict=True)
        yield [text.removeprefix(head).rstrip("\N{REPLACEMENT CHARACTER}") for head, text in pairs]


def text_sampler(config, mesh, corpus):
    """Returns `sample(params, routing_state)`, which all processes of a training run must call. It
    returns the beginning of the validation split with a continuation at temperature 0.8, always
    with the same random keys. Raises `UserError` if the model cannot decode token by token.
    """
    store, tokenizer = next(iter(corpus.validation.values())), load_tokenizer(corpus.tokenizer)
    decoder = Decoder.from_config(config)
    end, longest = tokenizer.end_of_text, config.model.max_len
    with naming(f"config.train.sample_every={config.train.sample_every}"):
        generator = Generator(Model(config, decoder, mesh, {}, {}, tokenizer, end, [end], [], None))
    prompt = store.read(0, min(16, longest, len(store))).tolist()
    n_tokens, sampling = min(64, longest - len(prompt)), Sampling(temperature=0.8)
    unstack = jax.jit(partial(unstacked, decoder, mesh=mesh))  # compiles once

    def sample(params, routing_state):
        weights = unstack(params), routing_state
        drawn = generator.generate([prompt], n_tokens, sampling=sampling, weights=weights)
        return tokenizer.decode(prompt + drawn[0])

    return sample
