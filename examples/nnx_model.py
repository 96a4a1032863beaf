"""Trains a GPT in Flax NNX whose feed-forward layers are `aoe_jax.nnx.AoE`.

python examples/nnx_model.py
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aoe_jax.nnx import AoE

TEXT = Path(__file__).parents[1] / "LICENSE"


def aoe(d_model, rngs):
    """Returns an AoE layer, `x -> (y, aux)`."""
    return AoE(d_model, n_experts=8, top_k=2, d_ffn=d_model, rngs=rngs)


class Block(nnx.Module):
    """A block of causal attention and, unless `feed_forward` is None, a layer `x -> (y, aux)`."""

    def __init__(self, d_model, n_heads, feed_forward, rngs):
        self.norm, self.norm_2 = (nnx.RMSNorm(d_model, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(n_heads, d_model, decode=False, rngs=rngs)
        self.feed_forward = feed_forward and feed_forward(d_model, rngs)

    def __call__(self, x, mask):
        """`x [B, S, d]` -> `(y [B, S, d], auxiliary loss)`."""
        x = x + self.attention(self.norm(x), mask=mask)
        if self.feed_forward is None:
            return x, 0.0
        y, aux = self.feed_forward(self.norm_2(x))
        return x + y, aux.loss


class GPT(nnx.Module):
    """A byte-level GPT. `feed_forward(d_model, rngs)` makes the feed-forward layer of a block."""

    def __init__(self, feed_forward=aoe, *, d_model=64, n_layers=2, length=32, rngs):
        self.embed = nnx.Embed(256, d_model, rngs=rngs)
        self.place = nnx.Embed(length, d_model, rngs=rngs)
        self.blocks = nnx.List(Block(d_model, 4, feed_forward, rngs) for _ in range(n_layers))
        self.norm = nnx.RMSNorm(d_model, rngs=rngs)
        self.output = nnx.Linear(d_model, 256, rngs=rngs)

    def __call__(self, tokens):
        """`tokens [B, S]` -> `(logits [B, S, 256], sum of the auxiliary losses)`."""
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        mask, loss = nnx.make_causal_mask(tokens), 0.0
        for block in self.blocks:
            x, aux_loss = block(x, mask)
            loss += aux_loss
        return self.output(self.norm(x)), loss


def losses(model, tokens):
    """Returns `(nll + auxiliary losses, nll)`; nll is the negative log-likelihood per byte."""
    logits, aux_loss = model(tokens[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    return nll + aux_loss, nll


@nnx.jit
def train_step(model, optimizer, tokens):
    """Updates the model; returns the negative log-likelihood."""
    (_, nll), grads = nnx.value_and_grad(losses, has_aux=True)(model, tokens)
    optimizer.update(model, grads)
    return nll


def batch_of(text, rng, batch=16, length=32):
    """Cuts `batch` random windows from a text; returns int32 `[batch, length + 1]`."""
    first = rng.integers(0, len(text) - length, batch)
    return text[first[:, None] + np.arange(length + 1)].astype(np.int32)


def train(model, text, steps, seed=0, learning_rate=3e-3, **size):
    """Trains on a text, a uint8 array; returns the negative log-likelihood of each step."""
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    return [float(train_step(model, optimizer, batch_of(text, rng, **size))) for _ in range(steps)]


if __name__ == "__main__":
    found = train(GPT(rngs=nnx.Rngs(0)), np.frombuffer(TEXT.read_bytes(), np.uint8), steps=200)
    print(f"nll of the first step {found[0]:.3f}, of the last {found[-1]:.3f} nats per byte")
