"""Self-contrast: its formula, its two passes with caches of their own, and refused models."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.contrast import Contrast, contrasted, strong_and_weak
from aoe_jax.evaluation.generation import Generator, Sampling
from aoe_jax.methods.ranked import Ranked
from aoe_jax.model.decoder import Decoder
from tests.evaluation.models import make_config, make_model, sharpened

pytestmark = pytest.mark.usefixtures("ragged")

KINDS = {
    "aoe": {},
    "aoe, 4 devices": {"mesh__expert": 2, "mesh__tensor": 2, "experts__round_to": 2},
    "router": {"experts__kind": "router", "routing__norm_topk_prob": False},
    "aoe top_p": {"routing__name": "top_p"},
}
N_TOKENS = 12


@cache
def model(kind):
    """A model of sharp logits; AoE's choice is biased."""
    made = make_model(make_config(**{"mesh__data": 1} | KINDS[kind]), sharpened)
    biased = kind in ("aoe", "aoe, 4 devices")
    state = {"selection_bias": jax.random.normal(jax.random.key(5), (2, 4))} if biased else {}
    return dataclasses.replace(made, routing_state=state)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 250, length).tolist() for length in (3, 20, 9)]


@cache
def full_pass(kind, experts, routing):
    """Logits `[B, S, V]` of texts, all in one shape, on one device."""
    there = model(kind)
    apply = jax.jit(Decoder(there.config.model, experts, routing).apply)
    params, state = jax.device_get((there.params, there.routing_state))

    def logits(texts):
        # Later tokens have no effect.
        padded = np.array([text + [0] * (32 - len(text)) for text in texts], np.int32)
        return np.asarray(apply({"params": params}, padded, None, None, state)[0])

    return logits


def by_full_passes(kind, contrast):
    """The likeliest tokens after `prompts()`, by the formula as it is published, all computed anew
    for every token.
    """
    experts = model(kind).config.experts
    strong_experts = dataclasses.replace(experts, top_k=contrast.strong_k or experts.top_k)
    strong_pass = full_pass(kind, strong_experts, model(kind).config.routing)
    weak = dataclasses.replace(experts, top_k=1)
    weak_pass = full_pass(kind, weak, Ranked((contrast.weak_rank - 1,)))
    texts = prompts()
    for _ in range(N_TOKENS):
        strong = strong_pass(texts).astype(float)
        weak = weak_pass(texts).astype(float) if contrast.beta else strong
        for i, text in enumerate(texts):
            z_strong, z_weak = strong[i, len(text) - 1], weak[i, len(text) - 1]
            valid = contrast.alpha == 0 or z_strong >= np.log(contrast.alpha) + z_strong.max()
            z = (1 + contrast.beta) * z_strong - contrast.beta * z_weak
            text.append(int(np.where(valid, z, -np.inf).argmax()))
    continuations = [text[len(prompt) :] for text, prompt in zip(texts, prompts(), strict=True)]
    end = model(kind).tokenizer.end_of_text
    return [row[: row.index(end)] if end in row else row for row in continuations]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "contrast"),
    [
        slow("aoe, 4 devices", Contrast(0.5)),
        slow("router", Contrast(0.9, alpha=0.01, strong_k=3, weak_rank=4)),
        slow("aoe top_p", Contrast(0.7, alpha=0.0)),
        slow("aoe", Contrast(0.0)),
        ("router", Contrast(7.0, alpha=1.0)),
    ],
)
def test_a_batch_is_decoded_as_by_full_passes(kind, contrast):
    """It is greedy decoding without contrast, and where one token alone is valid."""
    want = by_full_passes(kind, contrast)
    generator = Generator(model(kind), contrast)
    assert generator.generate(prompts(), N_TOKENS, sampling=Sampling(0.0), chunk=5) == want
    is_greedy = contrast.beta == 0 or contrast.alpha == 1
    greedy = by_full_passes(kind, dataclasses.replace(contrast, beta=0.0))
    assert (want == greedy) == is_greedy and sum(map(len, want)) > 2 * N_TOKENS


@pytest.mark.smoke
def test_contrasted_logits():
    strong, weak = jax.random.normal(jax.random.key(0), (2, 7, 50), jnp.float32) * 3
    z = contrasted(strong, weak, Contrast(0.5, alpha=0.1))
    share = jax.nn.softmax(strong)
    valid = np.asarray(share >= 0.1 * share.max(axis=1, keepdims=True))
    assert 1 < valid.sum(axis=1).mean() < 25
    np.testing.assert_allclose(z[valid], (1.5 * strong - 0.5 * weak)[valid], rtol=1e-5, atol=1e-5)
    assert np.isneginf(z[~valid]).all()
    np.testing.assert_array_equal(contrasted(strong, strong, Contrast(3.0))[valid], strong[valid])
    one = contrasted(strong, weak, Contrast(3.0, alpha=1.0))
    np.testing.assert_array_equal(one.argmax(axis=1), strong.argmax(axis=1))
    assert (np.isfinite(one).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(contrasted(strong, weak, Contrast(0.0, alpha=0.0)), strong)


BY_RANKS = "--contrast needs ranks of experts"


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        ({}, {"beta": -0.1}, r"--contrast=-0\.1: must be 0"),
        ({}, {"beta": float("nan")}, "--contrast=nan"),
        ({}, {"alpha": 1.5}, r"--alpha=1\.5: must be between 0"),
        ({}, {"strong_k": 0}, "--strong_k=0: must be 1"),
        ({}, {"weak_rank": 0}, "--weak_rank=0: must be 1 .the expert of highest score"),
        ({}, {"weak_rank": 5}, r"--weak_rank=5: cannot be greater than .*n_experts=4"),
        ({}, {"strong_k": 5}, r"--strong_k=5: cannot be greater than .*n_experts=4"),
        ({"routing__name": "top_p"}, {"strong_k": 2}, "--strong_k=2: .*name='top_p' has no K"),
        ({"routing__name": "threshold"}, {}, "name='threshold': --contrast is not tested"),
        *(
            ({"experts__kind": kind}, {}, f"kind='{kind}': {BY_RANKS}")
            for kind in ("dense", "capacity", "uoe", "thor")
        ),
        ({"experts__kind": "smear", "routing__segment": 8}, {}, f"kind='smear': {BY_RANKS}"),
    ],
)
def test_mistakes(experts, settings, message):
    with pytest.raises(UserError, match=message):
        strong_and_weak(
            Decoder.from_config(make_config(**experts)), Contrast(**{"beta": 0.5} | settings)
        )
