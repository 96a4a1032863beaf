"""Computes nll, perplexity and bits per byte on held-out text, and the load of the experts."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.token_store import TokenStore
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.sharding import replicated
from aoe_jax.training.step import sequence_nll


def perplexity(nll):
    """`exp(nll)`, or infinity if the exponential overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll))


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a split and, if it has several sources, of each source."""

    nll_sum: float  # nats, summed over `tokens` targets
    tokens: int
    text_bytes: int  # length of the text in UTF-8
    stats: LayerStats  # stacked over layers, averaged over tokens
    sources: dict[str, "Evaluation"] = field(default_factory=dict)  # empty for a single source

    @property
    def nll(self):
        """Nats per token."""
        return self.nll_sum / self.tokens

    @property
    def perplexity(self):
        return perplexity(self.nll)

    @property
    def bits_per_byte(self):
        """Bits per byte of text; comparable between models with different vocabularies."""
        return self.nll_sum / math.log(2) / self.text_bytes

    def metrics(self):
        """`{name: value}`: `nll`, `bits_per_byte` and, for several sources, `NAME/SOURCE`."""
        found = {"nll": self.nll, "bits_per_byte": self.bits_per_byte}
        for source, result in self.sources.items():
            found |= {f"{name}/{source}": value for name, value in result.metrics().items()}
        return found

    def in_words(self):
        """The nll, perplexity and bits per byte over all sources, as text."""
        scores = f"nll {self.nll:.4f} | perplexity {self.perplexity:.2f}"
        return f"{scores} | bits per byte {self.bits_per_byte:.4f}"

    def __str__(self):
        sources = [f"{name} {result.in_words()}" for name, result in self.sources.items()]
        return " | ".join([self.in_words(), *sources])


def compile_eval_step(decoder: Decoder, document_mask, mesh: Mesh):
    """Jits `(params, routing_state, batch) -> (nll sum, tokens, stats)`; results are replicated."""
    decoder = decoder.clone(balance=dataclasses.replace(decoder.balance, aux_tokens=1.0))

    def eval_step(params, routing_state, batch):
        nll, stats = sequence_nll(decoder, params, routing_state, batch, document_mask)
        return nll, batch["weights"].sum(), stats

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def evaluate(score, stores: Mapping[str, TokenStore], seq_len, batch_size, put, progress=False):
    """Returns the `Evaluation` of a split given as `{source: store}`; every target counts once.

    `score(batch)` calls the function of `compile_eval_step` with parameters and routing state.
    `put(batch)` moves a host batch, `batch_size` windows of `seq_len` tokens, to the devices.
    """
    sources, hidden = {}, None if progress else True  # None: tqdm shows bars only on a terminal
    for name, store in stores.items():
        batches = eval_batches(store, seq_len, batch_size)
        total = math.ceil((len(store) - 1) / (seq_len * batch_size))
        bar = tqdm(batches, name, total, unit="batch", delay=2, leave=False, disable=hidden)
        sources[name] = evaluate_batches(score, bar, put, store.text_bytes)
    parts = list(sources.values())
    if len(parts) == 1:
        return parts[0]
    counts = [part.tokens for part in parts]
    nll_sum, text_bytes = sum(p.nll_sum for p in parts), sum(p.text_bytes for p in parts)
    mean = partial(np.average, axis=0, weights=counts)
    stats = jax.tree.map(lambda *of_parts: mean(of_parts), *(part.stats for part in parts))
    return Evaluation(nll_sum, sum(counts), text_bytes, stats, sources)


def evaluate_batches(score, batches: Iterable[dict], put, text_bytes=0):
    """The `Evaluation` of host batches. `score` and `put` are the functions of `evaluate`."""
    total = None
    for batch in batches:
        nll, tokens, stats = jax.device_get(score(put(batch)))
        stats = jax.tree.map(lambda a: np.asarray(a, np.float64) * tokens, stats)
        sums = (float(nll), float(tokens), stats)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    nll_sum, tokens, stats = total
    means = jax.tree.map(lambda a: a / tokens, stats)
    return Evaluation(float(nll_sum), int(tokens), text_bytes, means)
