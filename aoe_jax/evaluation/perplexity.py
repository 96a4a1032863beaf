"""Held-out nll, perplexity and bits per byte, with the load statistics of the same tokens.

L layers, n experts.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import numpy as np

from aoe_jax.config import Config
from aoe_jax.experts.balance import LayerStats
from aoe_jax.training.step import sequence_nll


@dataclass(frozen=True)
class Evaluation:
    """Sums over every token of a split."""

    nll_sum: float  # nats
    tokens: int
    text_bytes: int  # of UTF-8 text that the tokens stand for
    stats: LayerStats  # stacked over layers, mean over tokens

    @property
    def nll(self):
        """Nats per token."""
        return self.nll_sum / self.tokens

    @property
    def perplexity(self):
        """`exp(nll)`."""
        return math.exp(self.nll)

    @property
    def bits_per_byte(self):
        """Bits per byte of text, comparable between vocabularies and with compressors."""
        return self.nll_sum / math.log(2) / self.text_bytes


def make_eval_step(config: Config):
    """`(params, selection_bias, batch) -> (nll sum, tokens, stats)`, statistics over all tokens; jit it."""
    config = dataclasses.replace(config, balance=dataclasses.replace(config.balance, aux_tokens=1.0))

    def eval_step(params, selection_bias, batch):
        nll, stats = sequence_nll(config, params, selection_bias, batch)
        return nll, batch["weights"].sum(), stats

    return eval_step


def evaluate(eval_step, params, selection_bias, batches, put, text_bytes):
    """Runs `eval_step` over all batches.

    Args:
      eval_step: a jitted `make_eval_step`.
      params: the decoder's parameters.
      selection_bias: `[L, n]` of loss-free balancing, or None.
      batches: host batches that cover the split once.
      put: moves a host batch to the devices.
      text_bytes: bytes of UTF-8 text in the split.
    """
    nll_sum, tokens, weighted = 0.0, 0.0, None
    for batch in batches:
        nll, count, stats = jax.device_get(eval_step(params, selection_bias, put(batch)))
        nll_sum += float(nll)
        tokens += float(count)
        scaled = jax.tree.map(lambda a, count=count: np.asarray(a, np.float64) * count, stats)
        weighted = scaled if weighted is None else jax.tree.map(np.add, weighted, scaled)
    return Evaluation(nll_sum, int(tokens), text_bytes, jax.tree.map(lambda a: a / tokens, weighted))
