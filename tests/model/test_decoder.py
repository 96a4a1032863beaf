"""The decoder: causality, rotary positions, document masks, remat, dtypes, a shared table."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from aoe_jax import Decoder
from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.methods.capacity import Capacity
from aoe_jax.methods.dense import Dense
from aoe_jax.methods.expert_choice import ExpertChoice
from aoe_jax.model.attention.multi_head import rotary, rotary_tables
from aoe_jax.moe.routing import TopK
from tests.arrays import assert_close, normal

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("ragged")]

MODEL = ModelConfig(n_layers=2, n_heads=2, d_model=16, vocab_size=50, dtype="float32")
EXPERTS = ExpertsConfig(n_experts=4, top_k=2, d_ffn=24, d_low=4)
TOP_K = TopK()
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)


@cache
def build(model=MODEL, routing=TOP_K, **experts):
    experts = dataclasses.replace(EXPERTS, **experts)
    decoder = Decoder(model, experts, Dense() if experts.kind == "dense" else routing)
    return decoder, jax.jit(decoder.init)(jax.random.key(0), TOKENS)


def kept(function, variables):
    """Shapes of the arrays that the forward pass keeps for the backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(function, v)[1], variables))


@pytest.mark.parametrize(
    ("settings", "leaks"),
    [
        ({"kind": "aoe"}, False),
        ({"kind": "router"}, False),
        ({"kind": "dense"}, False),
        ({"kind": "aoe", "routing": ExpertChoice()}, True),
        ({"kind": "capacity", "top_k": 1, "routing": Capacity(1.0)}, False),
        # The first choice of a later token may take the place of an earlier token's second.
        ({"kind": "capacity", "top_k": 2, "routing": Capacity(1.0)}, True),
    ],
    ids=str,
)
def test_causality(settings, leaks):
    """By value; `tests/test_methods.py` has other routers, and gradients."""
    decoder, variables = build(**settings)
    other = TOKENS.at[:, 6:].set((TOKENS[:, 6:] + 17) % 50)
    apply = jax.jit(decoder.apply)
    a, b = (apply(variables, tokens)[0][:, :6] for tokens in (TOKENS, other))
    assert (float(jnp.abs(a - b).max()) > 1e-4) == leaks


def test_parameters_statistics_and_dtypes():
    """Layers are scanned and start different; the table is shared; parameters are float32."""
    decoder, variables = build(dataclasses.replace(MODEL, dtype="bfloat16"))
    params = variables["params"]
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert set(params) == {"embed", "layers", "final_norm"}
    w_up = params["layers"]["experts"]["w_up"]
    assert w_up.shape[0] == 2 and float(jnp.abs(w_up[0] - w_up[1]).max()) > 0.01
    _, untied = build(dataclasses.replace(MODEL, tie_embeddings=False))
    assert untied["params"]["output"]["embedding"].shape == (50, 16)
    logits, stats = jax.jit(decoder.apply)(variables, TOKENS)
    hidden, _ = jax.eval_shape(lambda: decoder.apply(variables, TOKENS, method="features"))
    assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    assert stats.load.shape == (2, 4) and stats.confidence_entropy.shape == (2,)
    exact = jax.jit(build()[0].apply)(variables, TOKENS)[0]
    assert float(jnp.abs(logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_rotary_depends_on_distance_only():
    q, k = normal(0, (2, 1, 3, 1, 8))
    q, k = (jnp.broadcast_to(a, (1, 3, 10, 8)) for a in (q, k))
    tables = rotary_tables(10, ModelConfig(n_heads=1, d_model=8))
    scores = jnp.einsum("bhqd,bhkd->bhqk", rotary(q, *tables), rotary(k, *tables))
    assert_allclose(scores[..., :-1, :-1], scores[..., 1:, 1:], atol=1e-4)
    assert_allclose(
        jnp.linalg.norm(rotary(q, *tables), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )
    assert float(jnp.abs(scores[0, 0, 0] - scores[0, 0, 0, 0]).max()) > 0.1


def test_document_mask_separates_documents():
    decoder, variables = build()
    segment_ids = jnp.where(jnp.arange(12) < 5, 1, 2)[None].repeat(2, 0)
    apply = jax.jit(decoder.apply)
    together = apply(variables, TOKENS, segment_ids)[0]
    changed = TOKENS.at[:, :5].set((TOKENS[:, :5] + 3) % 50)
    assert_allclose(apply(variables, changed, segment_ids)[0][:, 5:], together[:, 5:], atol=1e-5)
    alone = apply(variables, TOKENS[:, 5:])[0]
    assert_allclose(together[:, 5:], alone, atol=1e-4)  # rotary positions are relative
    assert float(jnp.abs(apply(variables, TOKENS)[0] - together)[:, 5:].max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "router", "dense"])
def test_remat_changes_memory_but_no_gradient(kind):
    saved, grads, (plain, variables) = {}, {}, build(kind=kind)
    modes = ("none", "layer", "full", *(["experts"] if kind != "dense" else []))
    for remat in modes:
        decoder = plain.clone(model=dataclasses.replace(MODEL, remat=remat))

        def loss(v, decoder=decoder):
            logits, stats = decoder.apply(v, TOKENS)
            return (logits**2).mean() + stats.mean_probability[..., 0].sum()

        saved[remat] = sum(a.size for a in kept(loss, variables))
        grads[remat] = jax.jit(jax.grad(loss))(variables)
    assert saved["full"] < saved["layer"] < 0.6 * saved["none"]
    assert kind == "dense" or saved["experts"] < 0.95 * saved["none"]
    for remat in modes[1:]:
        assert_close(grads[remat], grads["none"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "experts"])
def test_several_layers_at_once_compute_the_same(remat):
    """2 does not divide the number of layers."""
    decoder, variables = build(dataclasses.replace(MODEL, n_layers=3))

    def gradient(unroll):
        model = dataclasses.replace(decoder.model, unroll=unroll, remat=remat)
        apply = decoder.clone(model=model).apply
        return jax.jit(jax.value_and_grad(lambda v: (apply(v, TOKENS)[0] ** 2).mean()))(variables)

    want = gradient(1)
    for unroll in (2, 3):
        assert_close(gradient(unroll), want, 1e-6)


@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_what_recomputing_experts_keeps(kind):
    """By row: `x w_up`, and `x w_gate` or AoE's code. No copy of weights in bfloat16 is kept."""
    model = dataclasses.replace(MODEL, remat="experts", dtype="bfloat16")
    experts = dataclasses.replace(EXPERTS, kind=kind, n_experts=3, d_ffn=40, d_low=5)
    decoder = Decoder(model, experts)
    variables = jax.eval_shape(decoder.init, jax.random.key(0), TOKENS)
    shapes = [
        a.shape
        for a in kept(lambda v: decoder.apply(v, TOKENS)[0], variables)
        if a.dtype == jnp.bfloat16
    ]
    tokens, width = TOKENS.size, decoder.experts.width(16)
    # Rows and free places.
    by_row = sorted(shape[-1] for shape in shapes if len(shape) == 3 and shape[1] >= 2 * tokens)
    assert by_row == ([5, width] if kind == "aoe" else [width, width])
    assert not [shape for shape in shapes if shape[:2] == (2, 3)]


@pytest.mark.parametrize(
    ("remat", "code"),
    [
        ("none", "d_low"),
        pytest.param("experts", "d_low", marks=pytest.mark.slow),
        ("layer", "score_neurons"),
        ("full", "d_low"),
    ],
)
def test_scores_are_not_computed_again(remat, code):
    """Only balance losses have products with the w_gate_down of all experts in the backward pass.
    The chosen experts `[L, T, K]` of a recomputed layer are kept: another top-k could break ties
    the other way.
    """
    model = dataclasses.replace(MODEL, remat=remat)
    experts, tokens = dataclasses.replace(EXPERTS, n_experts=7, **{code: 5}), []
    for balance in (BalanceConfig(aux_weight=0.0), BalanceConfig(aux_tokens=0.5)):
        decoder = Decoder(model, experts, balance=balance)
        variables = jax.eval_shape(decoder.init, jax.random.key(0), TOKENS)

        def loss(v, decoder=decoder):
            logits, stats = decoder.apply(v, TOKENS)
            return (logits**2).mean() + stats.mean_probability[0, 0]

        lines = jax.jit(jax.grad(loss)).lower(variables).as_text().splitlines()
        caches = (
            re.search(r"tensor<(\d+)x7x5xf32>", line) for line in lines if "dot_general" in line
        )
        tokens.append(sorted(int(cache[1]) for cache in caches if cache))
        indices = [a.shape for a in kept(loss, variables) if a.dtype == jnp.int32]
        assert remat not in ("layer", "full") or (2, TOKENS.size, 2) in indices
    assert tokens == [[TOKENS.size], [TOKENS.size // 2] * 3 + [TOKENS.size]]
