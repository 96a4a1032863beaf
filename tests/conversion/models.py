"""Small models, their tokens, and experts as arrays by name."""

import functools

import jax
import numpy as np

from aoe_jax.conversion.observations import observations, score_moments
from aoe_jax.data.tokenizer import train_tokenizer
from tests.evaluation.models import WORDS, make_config, make_model
from tests.formats.test_loading import load
from tests.formats.test_writing import written
from tests.runs import tiny_config

KINDS = {
    "aoe": {},
    "router": {"experts__kind": "router"},
    "capacity": {"experts__kind": "capacity", "routing__capacity_factor": 1.0},
    "router, top_p": {"experts__kind": "router", "routing__name": "top_p", "routing__p": 0.4},
}
SHAPES = {
    "aoe": {"w_gate_down": (16, 6), "w_gate_up": (6, 20), "w_up": (16, 20), "w_down": (20, 16)},
    "router": {"w_gate": (16, 20), "w_up": (16, 20), "w_down": (20, 16)},
}


def batches(n=3, seed=0):
    """Random tokens in host batches, some of them padding."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        tokens = rng.integers(0, 250, (8, 33), dtype=np.int32)
        segment_ids = np.ones((8, 32), np.int32)
        segment_ids[-1, 20:] = 0
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}
        found.append(batch | {"weights": segment_ids.astype(np.float32)})
    return found


@functools.cache
def model_of(kind):
    """A model of random weights, of one of `KINDS`."""
    return make_model(make_config(**KINDS[kind]))


@functools.cache
def moments_of(kind):
    """`Moments` of `model_of` over `batches()`."""
    return score_moments(model_of(kind), batches())


def observed(model, of_batches):
    """`(scores [L, T, Z], chosen [L, T, Z], x [L, T, d])` of all batches."""
    found = zip(*observations(model, of_batches, with_inputs=True), strict=True)
    return tuple(np.concatenate(arrays, axis=1) for arrays in found)


def draw(kind, seed=0):
    """A random expert of a kind of `SHAPES`."""
    normal = np.random.default_rng(seed).normal
    return {
        name: normal(size=shape, scale=shape[0] ** -0.5) for name, shape in SHAPES[kind].items()
    }


def disguised(expert, seed):
    """The same function and norms: hidden units in another order, the low rank rotated."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(expert["w_up"].shape[1])
    found = {
        name: a[order] if name == "w_down" else a[:, order]
        for name, a in expert.items()
        if name != "w_gate_down"
    }
    if "w_gate_down" in expert:
        q = np.linalg.qr(rng.normal(size=(expert["w_gate_down"].shape[1],) * 2))[0]
        found |= {"w_gate_down": expert["w_gate_down"] @ q, "w_gate_up": q.T @ found["w_gate_up"]}
    return {name: found[name].astype(a.dtype) for name, a in expert.items()}


def source(folder, dtype="float32", **changes):
    """The directory of a random model with a tokenizer, to convert."""
    directory = written(folder, tiny_config(**changes), dtype)[0]
    train_tokenizer(WORDS, 280).save(directory)
    return directory


def experts_of(directory, layer):
    """The experts' parameters of a layer in a directory, by name."""
    experts = parameters(directory)["layers"]["experts"]
    return {name: a[layer] for name, a in experts.items()}


def parameters(directory):
    """The decoder's parameters in a directory, on the host."""
    return jax.device_get(load(directory))
