"""A complete training loop with optax. It trains a byte-level language model in Linen, whose
feed-forward layers are `AoE`, on the text of this project's licence.

    python examples/train_loop.py
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aoe_jax import AoE

TEXT = Path(__file__).parents[1] / "LICENSE"


class Model(nn.Module):
    """Two blocks, each with causal attention and an AoE layer."""

    d_model: int = 64

    @nn.compact
    def __call__(self, tokens):
        """`tokens [B, S]` -> `(logits [B, S, 256], list of the layers' Aux)`."""
        place = self.param("place", nn.initializers.normal(0.02), (tokens.shape[1], self.d_model))
        x = nn.Embed(256, self.d_model)(tokens) + place
        mask, auxes = nn.make_causal_mask(tokens), []
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.RMSNorm()(x), mask=mask)
            y, aux = AoE(n_experts=8, top_k=2, d_ffn=64)(nn.RMSNorm()(x))
            x = x + y
            auxes.append(aux)
        return nn.Dense(256)(nn.RMSNorm()(x)), auxes


def train(steps=200, batch=16, length=32):
    """Trains the model; returns a list of the printed metrics."""
    text = np.frombuffer(TEXT.read_bytes(), np.uint8).astype(np.int32)
    rng, model = np.random.default_rng(0), Model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, length), jnp.int32))
    optimizer = optax.adamw(3e-3)
    state = optimizer.init(params)

    def loss_fn(params, tokens):
        logits, auxes = model.apply(params, tokens[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return nll + sum(aux.loss for aux in auxes), {"nll": nll} | auxes[0].metrics

    @jax.jit
    def step(params, state, tokens):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    lines = []
    for number in range(1, steps + 1):
        first = rng.integers(0, len(text) - length, batch)
        tokens = text[first[:, None] + np.arange(length + 1)]
        params, state, metrics = step(params, state, tokens)
        if number == 1 or number % 20 == 0:
            lines.append({name: round(float(value), 3) for name, value in metrics.items()})
            print(number, lines[-1])
    return lines


if __name__ == "__main__":
    train()
