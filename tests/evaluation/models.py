"""Models for the tests of evaluation, as `load_model` gives them, without a run."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.evaluation.models import Model
from aoe_jax.model.declared import state_shardings
from aoe_jax.model.decoder import Decoder
from aoe_jax.sharding import fill_mesh, make_mesh
from tests.settings import config_of

SETTINGS = {"model.n_layers": 2, "model.n_heads": 2, "model.d_model": 32, "model.vocab_size": 300}
SETTINGS |= {"model.max_len": 64, "model.dtype": "float32", "experts.n_experts": 4}
SETTINGS |= {"experts.top_k": 2, "experts.d_ffn": 32, "experts.d_low": 8, "data.seq_len": 32}
SETTINGS |= {"balance.aux_weight": 0.0, "train.batch_size": 8}
WORDS = ["the state of the union", "a cat sat on a mat", "peace and war, law and order: yes or no?"]


def make_config(**changes):
    """A tiny configuration, `group__field=value`."""
    return config_of(SETTINGS | {name.replace("__", "."): v for name, v in changes.items()})


def make_model(config, change=lambda params: params):
    """A model of random weights after a `change`, over as many devices as its mesh asks for."""
    size = math.prod(max(n, 1) for n in config.mesh.shape)
    config = fill_mesh(config, size)
    mesh = make_mesh(config, jax.devices()[:size])
    decoder = Decoder.from_config(config)
    params = change(
        jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(mesh, params))
    tokenizer = train_tokenizer(WORDS, 280)
    end = tokenizer.end_of_text
    return Model(config, decoder, mesh, params, {}, tokenizer, end, [end], [], 7)


def sharpened(params):
    """Parameters of sharp logits, so that ties are improbable, and of biases that are not zero."""

    def noisy(a):
        return a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)

    return jax.tree.map(noisy, params)


def plain_scores(model, context, continuation):
    """`(log-likelihood, greedy)` by definition: one pass over one whole text, in float64.

    Zeros follow the text, which a causal model does not see, so that one length is compiled.
    """
    row = [*context, *continuation][-model.config.model.max_len - 1 : -1]
    config = dataclasses.replace(model.config, mesh=MeshConfig())
    padded = np.array([row + [0] * (model.config.model.max_len - len(row))])
    logits = np.asarray(_logits(config)(jax.device_get(model.params), padded)[0], np.float64)
    logits = logits[len(row) - len(continuation) : len(row)]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = log_probs[np.arange(len(continuation)), list(continuation)]
    return chosen.sum(), bool((log_probs.argmax(axis=1) == list(continuation)).all())


@functools.cache
def _logits(config):
    return jax.jit(
        lambda params, inputs: Decoder.from_config(config).apply({"params": params}, inputs)[0]
    )


def by_full_passes(logits, prompts, n_tokens, length=96):
    """The likeliest `n_tokens` after each prompt, by a full pass of all of them for each token.

    `logits` is a function of tokens `[B, S]`, whose last ones have no effect on earlier ones.
    """
    prompts = [list(prompt) for prompt in prompts]
    texts = [[*prompt] for prompt in prompts]
    for _ in range(n_tokens):
        padded = np.array([text + [0] * (length - len(text)) for text in texts], np.int32)
        for text, row in zip(texts, np.asarray(logits(padded)), strict=True):
            text.append(int(row[len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def until(end, texts):
    """The tokens of each text before its first `end`."""
    return [text[: text.index(end)] if end in text else text for text in texts]
