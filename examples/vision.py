"""Compares AoE and MoE layers in a classifier of handwritten digits.

    python examples/vision.py

An image of 8 x 8 pixels (scikit-learn's digits) is split into 16 tokens of 2 x 2 pixels. The AoE
layer and the MoE layer have about the same number of parameters.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from aoe_jax import AoE, MoE

N_TRAIN, BATCH = 1400, 100


class Classifier(nn.Module):
    """A classifier with attention and a layer of experts over image patches, and a linear layer."""

    layer: type[AoE] | type[MoE]

    @nn.compact
    def __call__(self, images):
        """`images [B, 8, 8]` -> `(logits [B, 10], auxiliary loss)`."""
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = nn.Dense(48)(patches) + self.param("place", nn.initializers.normal(0.1), (16, 48))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        y, aux = self.layer(n_experts=8, top_k=2, d_ffn=32)(nn.LayerNorm()(x))
        return nn.Dense(10)((x + y).reshape(x.shape[0], -1)), aux.loss


def accuracies(layer, epochs, seeds):
    """Trains a classifier for each seed; returns a list of the accuracies on test images."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 8 - 1, jnp.float32).reshape(-1, 8, 8)
    labels, model, optimizer = jnp.asarray(labels), Classifier(layer), optax.adamw(3e-3)

    def loss_fn(params, rows):
        logits, aux_loss = model.apply(params, images[rows])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()
        return nll + aux_loss

    def step(carry, rows):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def accuracy(key):
        keys, params = jax.random.split(key, epochs), model.init(key, images[:1])
        rows = jax.vmap(lambda key: jax.random.permutation(key, N_TRAIN))(keys)
        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, rows.reshape(-1, BATCH))
        logits, _ = model.apply(params, images[N_TRAIN:])
        return (logits.argmax(axis=1) == labels[N_TRAIN:]).mean()

    return [float(accuracy(jax.random.key(seed))) for seed in range(seeds)]


def compare(epochs=20, seeds=3):
    """Prints and returns the test accuracies of each kind of layer."""
    found = {layer.__name__: accuracies(layer, epochs, seeds) for layer in (AoE, MoE)}
    for name, values in found.items():
        print(f"{name}: test accuracy {np.mean(values):.3f}, by seed {np.round(values, 3)}")
    return found


if __name__ == "__main__":
    compare()
