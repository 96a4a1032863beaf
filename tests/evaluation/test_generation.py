"""Decoding with a cache is the full forward pass, token by token; drawing; what ends a text."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.evaluation.generation import Generator, Sampling, draw
from aoe_jax.model.decoder import Decoder
from tests.evaluation.models import by_full_passes, make_config, make_model, sharpened, until

VOCABULARY, END = 64, 0
GREEDY = Sampling(temperature=0.0)
SETTINGS = {"model__n_heads": 4, "model__d_model": 16, "model__vocab_size": VOCABULARY}
SETTINGS |= {"model__max_len": 128, "experts__n_experts": 8, "experts__d_ffn": 24}
SETTINGS |= {"data__seq_len": 16}
AOE, ROUTER = {"experts__d_wide": 16}, {"experts__kind": "router"}
ONE_LAYER = {"model__n_layers": 1}
KINDS = {
    "aoe": AOE,
    "aoe top_p": AOE | ONE_LAYER | {"routing__name": "top_p"},
    "aoe by attention": AOE
    | ONE_LAYER
    | {"routing__name": "da_moe", "experts__top_k": 8, "routing__reduce": "max"},
    "router, grouped queries": ROUTER
    | ONE_LAYER
    | {"model__n_kv_heads": 2, "model__qk_norm": "all"}
    | {"experts__d_shared": 16, "experts__shared_gate": True},
    "router, dense layers": ROUTER
    | {"routing__name": "sigmoid_top_k", "routing__n_groups": 2}
    | {"model__n_dense_layers": 2, "model__d_dense": 32, "model__rope_share": 0.5},
    "uoe": ONE_LAYER | {"experts__kind": "uoe"},
    "thor, by token": {"experts__kind": "thor", "routing__inference": "token"},
    "thor, by sequence": ONE_LAYER | {"experts__kind": "thor"},
    "dense, biases": ONE_LAYER
    | {"experts__kind": "dense", "model__attention_bias": True}
    | {"model__rope_factors": (1.0, 2.0)},
}
MESHES = {"alone": (1, 1, 1, 1), "data and fsdp": (2, 2, 1, 1), "expert and tensor": (1, 1, 2, 4)}


@cache
def model(kind, mesh=(1, 1, 1, 1), **experts):
    config = make_config(**SETTINGS | KINDS[kind] | experts)
    made = make_model(dataclasses.replace(config, mesh=MeshConfig(*mesh)), sharpened)
    bias = {"selection_bias": jax.random.normal(jax.random.key(5), (2, 8))}
    state = bias if kind in ("aoe", "router, dense layers") else {}
    return dataclasses.replace(made, start=END, ends=[END], routing_state=state)


def prompts(count=5):
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, length).tolist() for length in (3, 1, 20, 65, 9)[:count]]


@cache
def expected(kind):
    """The 20 likeliest tokens after each of `prompts()`, by full passes on one device."""
    there = model(kind)
    apply = jax.jit(there.decoder.apply)

    def logits(tokens):
        return apply({"params": there.params}, tokens, None, None, there.routing_state)[0]

    return until(END, by_full_passes(logits, prompts(), 20))


ON_A_MESH = ("aoe", "aoe by attention", "thor, by token", "router, dense layers")
SLOW = [("router, grouped queries", "data and fsdp")]
SLOW += [(kind, "alone") for kind in ("aoe top_p", "uoe", "thor, by sequence", "dense, biases")]
SLOW += [(kind, "expert and tensor") for kind in ON_A_MESH]
CASES = [
    pytest.param("aoe", "alone", marks=pytest.mark.smoke),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_a_batch_is_decoded_as_by_full_passes(kind, mesh, request):
    if (kind, mesh) != ("aoe", "alone"):
        request.getfixturevalue("ragged")
    got = Generator(model(kind, MESHES[mesh])).generate(prompts(), 20, sampling=GREEDY, chunk=7)
    assert got == expected(kind)
    assert len({tuple(tokens) for tokens in got}) > 2


@pytest.mark.slow
def test_in_bfloat16_each_token_is_about_the_likeliest_of_the_full_pass():
    """Rounding may turn one that is nearly as likely into the likeliest."""
    there = model("aoe")
    model_in_bf16 = dataclasses.replace(there.config.model, dtype="bfloat16")
    config = dataclasses.replace(there.config, model=model_in_bf16)
    coarse = dataclasses.replace(there, config=config, decoder=Decoder.from_config(config))
    found = Generator(coarse).generate(prompts(), 12, sampling=GREEDY)
    tokens = np.zeros((5, 96), np.int32)
    for row, prompt, new in zip(tokens, prompts(), found, strict=True):
        row[: len(prompt) + len(new)] = [*prompt, *new]
    apply = jax.jit(coarse.decoder.apply)
    logits = apply({"params": there.params}, tokens, None, None, there.routing_state)[0]
    short_of = [
        float(row[len(prompt) - 1 + i].max() - row[len(prompt) - 1 + i, token]) / logits.std()
        for row, prompt, new in zip(logits, prompts(), found, strict=True)
        for i, token in enumerate(new)
    ]
    assert len(short_of) > 40 and max(short_of) < 0.5 and np.mean(np.array(short_of) == 0) > 0.9


@cache
def generator():
    return Generator(model("aoe"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "uoe"])
def test_a_single_prompt_goes_row_by_row(kind):
    """Its chosen experts are fewer than all."""
    alone = generator() if kind == "aoe" else Generator(model(kind))
    assert alone.generate(prompts(1), 20, sampling=GREEDY) == expected(kind)[:1]


def test_ends_of_texts():
    whole = expected("aoe")
    few = generator().generate(prompts(), 3, sampling=GREEDY)
    assert few == [tokens[:3] for tokens in whole]
    stopped = generator().generate(
        prompts(), 20, sampling=GREEDY, chunk=4, is_done=lambda row: row != whole[2][:4]
    )
    assert stopped == [tokens[: 8 if number == 2 else 4] for number, tokens in enumerate(whole)]
    assert list(generator().stream([], 20)) == []


@pytest.mark.slow
def test_a_model_may_name_several_tokens_that_end_a_text():
    """A chat model does; the end-of-text token of its tokenizer need not be one of them."""
    whole = expected("aoe")
    longest = max(whole, key=len)
    end = longest[len(longest) // 2]
    chatty = Generator(dataclasses.replace(model("aoe"), ends=[END, end]))
    found = chatty.generate(prompts(), 20, sampling=GREEDY)
    assert found == until(end, whole) != whole


@pytest.mark.slow
def test_draws_depend_on_seed_prompt_and_place():
    sampling = Sampling(temperature=2.0, top_k=30, top_p=0.95)
    both = [
        generator().generate(prompts(), 20, sampling=sampling, seed=seed, chunk=chunk)
        for seed, chunk in ((1, 20), (1, 3), (2, 20))
    ]
    assert both[0] == both[1] != both[2]
    assert generator().generate(prompts(3), 20, sampling=sampling, seed=1) == both[0][:3]


@pytest.mark.smoke
def test_draws_have_the_probabilities_asked_for():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def frequencies(**settings):
        of_keys = jnp.broadcast_to(logits, (len(keys), 4))
        tokens = jax.jit(draw, static_argnums=2)(of_keys, keys, Sampling(**settings))
        return np.bincount(tokens, minlength=4) / len(keys)

    for settings, shares in [
        ({}, [10, 5, 3, 2]),
        ({"temperature": 0.5}, [100, 25, 9, 4]),
        ({"top_k": 2}, [2, 1, 0, 0]),
        ({"top_p": 0.7}, [2, 1, 0, 0]),
        ({"top_p": 0.76}, [10, 5, 3, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2, 1, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ]:
        wanted = np.array(shares) / sum(shares)
        np.testing.assert_allclose(frequencies(**settings), wanted, atol=0.015)
