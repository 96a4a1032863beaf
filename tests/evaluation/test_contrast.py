"""Self-contrast: its formula, its two passes with caches of their own, and refused models."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.contrast import SecondBest, contrasted, weak_pass
from aoe_jax.evaluation.generation import Generator, Sampling
from aoe_jax.model.decoder import Decoder
from tests.evaluation.models import by_full_passes, make_config, make_model, sharpened, until
from tests.moe.contexts import context

pytestmark = pytest.mark.usefixtures("ragged")

KINDS = {
    "aoe, 4 devices": {"mesh__expert": 2, "mesh__tensor": 2, "experts__round_to": 2},
    "router": {"experts__kind": "router", "routing__norm_topk_prob": False},
    "aoe top_p": {"routing__name": "top_p"},
}
N_TOKENS = 12


@cache
def model(kind):
    """A model of sharp logits; AoE's choice is biased."""
    made = make_model(make_config(**{"mesh__data": 1} | KINDS[kind]), sharpened)
    biased = kind == "aoe, 4 devices"
    state = {"selection_bias": jax.random.normal(jax.random.key(5), (2, 4))} if biased else {}
    return dataclasses.replace(made, routing_state=state)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 250, length).tolist() for length in (3, 20, 9)]


def expected(kind, beta):
    """The likeliest tokens after `prompts()`, by the published formula and full passes."""
    there = model(kind)
    params, state = jax.device_get((there.params, there.routing_state))

    def full_pass(k, routing):
        experts = dataclasses.replace(there.config.experts, top_k=k)
        apply = jax.jit(Decoder(there.config.model, experts, routing).apply)
        return lambda tokens: np.asarray(apply({"params": params}, tokens, None, None, state)[0])

    strong = full_pass(there.config.experts.top_k, there.config.routing)
    weak = full_pass(1, SecondBest())

    def logits(tokens):
        z_strong, z_weak = strong(tokens).astype(float), weak(tokens).astype(float)
        z = (1 + beta) * z_strong - beta * z_weak
        lowest = 0.1 * np.exp(z_strong).max(axis=-1, keepdims=True)
        return np.where(np.exp(z_strong) >= lowest, z, -np.inf)

    texts = by_full_passes(logits, prompts(), N_TOKENS, length=32)
    return until(there.tokenizer.end_of_text, texts)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "beta"), [slow("aoe, 4 devices", 0.5), ("router", 0.9), slow("aoe top_p", 0.7)]
)
def test_a_batch_is_decoded_as_by_full_passes(kind, beta):
    want = expected(kind, beta)
    generator = Generator(model(kind), beta)
    assert generator.generate(prompts(), N_TOKENS, sampling=Sampling(0.0), chunk=5) == want
    greedy = expected(kind, 0.0)
    assert want != greedy and sum(map(len, want)) > 2 * N_TOKENS


def test_ranks_count_from_the_highest_score():
    """A selection bias moves the ranks and not the weight."""
    scores, bias = jnp.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]), jnp.array([0.0, 0, -9, 0])
    for state, want in (({}, [2, 1]), ({"selection_bias": bias}, [1, 1])):
        routing = SecondBest()(scores, {}, context(scores, state=state))
        assert routing.expert.tolist() == want and routing.weight.tolist() == [1, 1]


@pytest.mark.smoke
def test_contrasted_logits():
    strong, weak = jax.random.normal(jax.random.key(0), (2, 7, 50), jnp.float32) * 3
    z = contrasted(strong, weak, 0.5)
    share = jax.nn.softmax(strong)
    valid = np.asarray(share >= 0.1 * share.max(axis=1, keepdims=True))
    assert 1 < valid.sum(axis=1).mean() < 25
    np.testing.assert_allclose(z[valid], (1.5 * strong - 0.5 * weak)[valid], rtol=1e-5, atol=1e-5)
    assert np.isneginf(z[~valid]).all()
    np.testing.assert_array_equal(contrasted(strong, strong, 3.0)[valid], strong[valid])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"experts__n_experts": 1, "experts__top_k": 1}, "n_experts=1: --contrast needs a second"),
        ({"routing__name": "threshold"}, "name='threshold': --contrast is not tested"),
        ({"experts__kind": "dense"}, "kind='dense': --contrast needs ranks of experts"),
        ({"experts__kind": "capacity"}, "kind='capacity': --contrast needs ranks of experts"),
    ],
)
def test_mistakes(experts, message):
    with pytest.raises(UserError, match=message):
        weak_pass(Decoder.from_config(make_config(**experts)))
