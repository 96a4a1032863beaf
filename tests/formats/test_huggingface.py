"""AoE models in transformers, by the classes that are written beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from aoe_jax.evaluation.generation import Generator
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.architectures import find_layouts
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import parameters_of, write_model
from aoe_jax.model.decoder import Decoder
from benchmarks.parity import load_there, logits_here, logits_there
from tests.evaluation.models import make_config, make_model
from tests.formats.test_writing import EVERYTHING, written
from tests.runs import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ragged")]

WHOLE = {"experts__score_neurons": 4}
FACTORS = (1.0, 1.0, 1.2, 1.5, 2.0, 4.0, 8.0, 8.0)
BIASED = {"balance__bias_rate": 0.01}
SHARED = {"experts__d_shared": 24, "model__qkv_bias": True, "model__rope_factors": FACTORS}
GATED = SHARED | {"experts__shared_gate": True, "model__qk_norm": "head"}
WIDE_HEADS = {"model__head_dim": 12, "model__qk_norm": "head", "model__n_kv_heads": 1}
IN_FRONT = {"model__n_dense_layers": 2, "model__d_dense": 24, "model__tie_embeddings": False}
PARTIAL = {"model__rope_share": 0.25, "model__rope_factors": (1.0, 2.0), "model__qk_norm": "head"}
PARTIAL |= {"model__n_kv_heads": 1}
FORMS = {
    "factorised": {},
    "factorised, max": {"experts__score": "max"},
    "factorised, biased": BIASED | {"routing__norm_topk_prob": False},
    "factorised, everything": EVERYTHING,
    "wide heads with a norm each": WHOLE | WIDE_HEADS,
    "whole": WHOLE | {"model__n_kv_heads": 1, "model__tie_embeddings": False},
    "shared expert": SHARED,
    "whole, shared expert with a gate": WHOLE | GATED,
    "whole, max": WHOLE | {"experts__score": "max", "experts__top_k": 3},
    "whole, over all": WHOLE | {"routing__norm_topk_prob": False},
    "dense in front": BIASED | IN_FRONT,
    "partial": EVERYTHING | {"model__rope_share": 0.5},
    "partial, dense in front": WHOLE | IN_FRONT | {"model__n_dense_layers": 1} | PARTIAL,
}
TOKENS = np.random.default_rng(1).integers(0, 512, (4, 48))


@pytest.mark.parametrize("form", FORMS)
def test_logits(tmp_path, form):
    """They are those of this project. A model that transformers has saved is read here again, bit
    for bit the same.
    """
    directory, *_ = written(tmp_path, tiny_config(**FORMS[form]))
    expected = logits_here(directory, TOKENS)
    assert np.abs(expected).max() > 1
    for attention in ("sdpa", "eager"):
        found = logits_there(directory, TOKENS, attn_implementation=attention)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    load_there(directory).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/modeling_aoe.py").exists()
    np.testing.assert_array_equal(logits_here(tmp_path / "saved", TOKENS), expected)


def test_bfloat16(tmp_path):
    """A selection bias stays float32."""
    import torch

    directory, *_ = written(tmp_path, tiny_config(**WHOLE, **BIASED), "bfloat16")
    model = load_there(directory, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.selection_bias.dtype == torch.float32
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)).logits.float().numpy()
    expected = logits_there(directory, TOKENS)
    # A token whose experts are nearly tied may go to other ones.
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(error) < 0.05
    model.save_pretrained(tmp_path / "saved")
    saved = logits_here(tmp_path / "saved", TOKENS)
    np.testing.assert_array_equal(saved, logits_here(directory, TOKENS))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    "form", ["factorised", "whole, shared expert with a gate", "partial, dense in front"]
)
def test_gradients(tmp_path, form):
    """All gradients are those of the loss here, with and without gradient checkpointing."""
    import torch

    config = tiny_config(**FORMS[form])
    directory, params, _, mesh, config = written(tmp_path, config)

    def loss(params):
        logits = Decoder.from_config(config).apply({"params": params}, jnp.asarray(TOKENS))[0]
        of_tokens = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
        return of_tokens.mean()

    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    model, tokens = load_there(directory).train(), torch.tensor(TOKENS)
    gradients = flatten_dict(gradients, sep="/")
    layouts = find_layouts("aoe", gradients)
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        found = model(tokens, labels=tokens).loss
        found.backward()
        assert found.item() == pytest.approx(float(value), rel=1e-5)
        of_torch = {name: p.grad.numpy() for name, p in model.named_parameters()}
        for path, expected in gradients.items():
            layout = layouts[path]
            bounds = layout.whole | ({"L": (0, 1)} if "layers/" in path else {})
            ((name, index),) = layout.tensors(bounds)
            expected = layout.to_file(np.asarray(expected)[*index, ...])
            atol = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(of_torch[name], expected, rtol=0, atol=atol)


def test_balance_loss(tmp_path):
    """The scores of all layers, and a loss that reaches them."""
    import torch

    directory, *_ = written(tmp_path, tiny_config(**WHOLE))
    model, tokens = load_there(directory).train(), torch.tensor(TOKENS)
    result = model(tokens, labels=tokens, output_router_logits=True)
    assert [scores.shape for scores in result.router_logits] == [(TOKENS.size, 4)] * 2
    result.aux_loss.backward()
    gradient = model.model.layers[1].mlp.experts.w_gate.grad
    assert (gradient[..., :4] != 0).any() and (gradient[..., 4:] == 0).all()


def test_a_model_from_a_configuration(tmp_path):
    """Initialised as here: activations of unit variance have scores near sqrt(r)."""
    import torch

    directory, *_ = written(tmp_path, tiny_config())
    there = load_there(directory)
    torch.manual_seed(0)
    model = type(there)(there.config)
    with pytest.raises(ValueError, match="score='median': choose one of norm, max"):
        type(there.config)(score="median")
    with pytest.raises(ValueError, match="qk_norm='heads': choose one of none, all, head"):
        type(there.config)(qk_norm="heads")
    experts = model.model.layers[0].mlp.experts
    _, scores = experts(torch.randn(500, 32))
    assert scores.mean().item() == pytest.approx(8**0.5, rel=0.1)


def test_generation(tmp_path):
    """Greedy tokens with a cache are those without, and those of this project."""
    import torch
    import transformers

    here = make_model(make_config(**FORMS["partial, dense in front"]))
    params = jax.tree.map(lambda a: 2 * a if a.ndim > 2 else a, here.params)  # clear choices
    here.tokenizer.save(tmp_path)
    directory = tmp_path / "model"
    directory.mkdir()
    values = to_json(here.config) | write_tokenizer(tmp_path, directory, 64)
    write_model(directory, values, *parameters_of(params, {}, "float32"))
    model = load_there(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["the state of the union is", "a cat sat"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ours = Generator(load_model(directory)).generate(rows, 24)
    for row, expected in zip(rows, ours, strict=True):
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        for use_cache in (True, False):
            found = model.generate(torch.tensor([row]), use_cache=use_cache, **settings)
            new = found[0, len(row) :].tolist()
            assert new[: len(expected)] == expected and len(expected) > 3
    assert ours[0] != ours[1]
    # Both texts are one batch, padded from the left.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    found = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=0)
    for row, expected in zip(found[:, batch["input_ids"].shape[1] :].tolist(), ours, strict=True):
        assert row[: len(expected)] == expected
