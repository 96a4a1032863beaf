"""Held-out nll, perplexity and bits per byte, with the load statistics of the same tokens.

L layers, n experts.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.token_store import TokenStore
from aoe_jax.experts.balance import LayerStats
from aoe_jax.model.decoder import Decoder
from aoe_jax.training.step import sequence_nll


@dataclass(frozen=True)
class Evaluation:
    """Sums over every token of a split; of several sources also of each."""

    nll_sum: float  # nats
    tokens: int
    text_bytes: int  # of UTF-8 text that the tokens stand for
    stats: LayerStats  # stacked over layers, mean over tokens
    sources: dict[str, "Evaluation"] = field(default_factory=dict)  # where there are several

    @property
    def nll(self):
        """Nats per token."""
        return self.nll_sum / self.tokens

    @property
    def perplexity(self):
        """`exp(nll)`; infinite where that is more than a number can hold."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self):
        """Bits per byte of text, comparable between vocabularies and with compressors."""
        return self.nll_sum / math.log(2) / self.text_bytes

    def figures(self):
        """`nll` and `bits_per_byte`, and with several sources `nll/SOURCE` and
        `bits_per_byte/SOURCE` of each.
        """
        figures = {"nll": self.nll, "bits_per_byte": self.bits_per_byte}
        for source, result in self.sources.items():
            figures |= {f"{name}/{source}": value for name, value in result.figures().items()}
        return figures

    def __str__(self):
        sources = "".join(
            f" | {name} nll {result.nll:.4f}, bits per byte {result.bits_per_byte:.4f}"
            for name, result in self.sources.items()
        )
        return f"nll {self.nll:.4f} | bits per byte {self.bits_per_byte:.4f}{sources}"


def make_eval_step(decoder: Decoder, document_mask):
    """`(params, routing_state, batch) -> (nll sum, tokens, stats)`, statistics over all tokens; jit
    it.

    `document_mask` is as in `DataConfig`.
    """
    decoder = decoder.clone(balance=dataclasses.replace(decoder.balance, aux_tokens=1.0))

    def eval_step(params, routing_state, batch):
        nll, stats = sequence_nll(decoder, params, routing_state, batch, document_mask)
        return nll, batch["weights"].sum(), stats

    return eval_step


def evaluate(score, stores: Mapping[str, TokenStore], seq_len, batch_size, put):
    """An `Evaluation` of a split: of every token of every source, each counted once and alike.

    Args:
      score: a jitted `make_eval_step` with its parameters and selection bias: host or device batch
        -> what that returns.
      stores: the split of each source by name.
      seq_len: tokens of a window.
      batch_size: windows of a batch.
      put: moves a host batch to the devices.
    """
    results = {
        name: _evaluated(score, eval_batches(store, seq_len, batch_size), put, store.text_bytes)
        for name, store in stores.items()
    }
    if len(results) == 1:
        return next(iter(results.values()))
    parts = list(results.values())
    tokens = sum(part.tokens for part in parts)
    return Evaluation(
        sum(part.nll_sum for part in parts),
        tokens,
        sum(part.text_bytes for part in parts),
        jax.tree.map(
            lambda *means: (
                sum(m * part.tokens for m, part in zip(means, parts, strict=True)) / tokens
            ),
            *(part.stats for part in parts),
        ),
        results,
    )


def _evaluated(score, batches, put, text_bytes):
    """Of one source, in batches that cover it once."""
    nll_sum, tokens, weighted = 0.0, 0.0, None
    for batch in batches:
        nll, count, stats = jax.device_get(score(put(batch)))
        nll_sum += float(nll)
        tokens += float(count)
        scaled = jax.tree.map(lambda a, count=count: np.asarray(a, np.float64) * count, stats)
        weighted = scaled if weighted is None else jax.tree.map(np.add, weighted, scaled)
    return Evaluation(
        nll_sum, int(tokens), text_bytes, jax.tree.map(lambda a: a / tokens, weighted)
    )
