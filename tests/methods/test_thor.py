"""THOR: which experts are drawn and learn, the loss that makes passes agree, and draws that can be
repeated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.thor import (
    Thor,
    consistent_cross_entropy,
    draw_by_position,
    draw_expert,
    layer_key,
)
from aoe_jax.model import loss
from aoe_jax.moe.layer import parameters_of
from aoe_jax.training.step import init_state, training_loss
from configs import methods
from tests.arrays import normal
from tests.methods.method_layers import by_loops
from tests.model.test_loss import inputs, plain

SEQUENCES, TOKENS, WIDTH, EXPERTS = 3, 12, 8, 4
FORMS = {"router": {}, "aoe": {"factorised_gate": True, "d_wide": 8}}


def make(form="router", recompute=False, training=False, dtype="float32", **settings):
    """The layer, its parameters, and tokens."""
    config = ExpertsConfig(kind="thor", n_experts=EXPERTS, top_k=1, d_ffn=8, d_low=4, **FORMS[form])
    layer = ExpertsLayer(
        config,
        routing=Thor(**settings),
        dtype=jnp.dtype(dtype),
        remat="experts" if recompute else "none",
        training=training,
    )
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(SEQUENCES, TOKENS, WIDTH)), jnp.float32)
    sizes = config.sizes(WIDTH)
    params = {
        name: jnp.asarray(0.5 * draw(size=parameter.shape(sizes)), jnp.float32)
        for name, parameter in parameters_of(layer.experts, layer.routing).items()
    }
    return layer, params, x


def by_each_expert(params, x):
    """The outputs of all tokens by each expert, `[n, B, S, d]`."""
    flat = x.reshape(-1, x.shape[-1])
    weights = jnp.eye(EXPERTS)[:, None].repeat(flat.shape[0], axis=1)
    return jnp.stack([by_loops(params, flat, w).reshape(x.shape) for w in weights])


def experts_of(y, outputs):
    """The expert of every token, `[B, S]`."""
    distance = jnp.abs(outputs - y).max(axis=-1)
    assert distance.min(axis=0).max() < 1e-5
    return np.asarray(distance.argmin(axis=0))


def test_draws_are_uniform():
    """Counts over keys and over positions lie within three standard deviations."""
    count, chance = 20_000, 1 / EXPERTS
    deviation = np.sqrt(count * chance * (1 - chance))
    keys = jax.random.split(jax.random.key(0), count)
    by_key = jax.vmap(lambda key: draw_expert(key, EXPERTS))(keys)
    by_position = draw_by_position(layer_key(0, 1), jnp.arange(count), EXPERTS)
    for found in (by_key, by_position):
        assert np.abs(np.bincount(found, minlength=EXPERTS) - count * chance).max() < 3 * deviation


@pytest.mark.parametrize("form", FORMS)
def test_in_training_one_expert_takes_the_batch_and_learns(form):
    layer, params, x = make(form, training=True)
    outputs, seen = by_each_expert(params, x), set()

    @jax.jit
    def step(key):
        def loss(params):
            y, _ = layer.apply({"params": params}, x, rngs={"experts": key})
            return (y**2).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    for i in range(8):
        gradient, y = step(jax.random.key(i))
        (expert,) = set(experts_of(y, outputs).ravel())
        for g in gradient.values():
            has_gradient = np.abs(g).sum(axis=(1, 2)) > 0
            assert_array_equal(has_gradient, np.arange(EXPERTS) == expert)
        seen.add(expert)
    assert len(seen) > 1


@pytest.mark.parametrize("form", FORMS)
def test_draws_at_inference_depend_on_layer_and_position(ragged, form):
    layer, params, x = make(form, inference="token")
    outputs = by_each_expert(params, x)
    want = [
        draw_by_position(layer_key(0, number), jnp.arange(TOKENS), EXPERTS) for number in range(3)
    ]

    @jax.jit
    def apply(x, layer_index, positions):
        return layer.apply({"params": params}, x, layer_index=layer_index, positions=positions)[0]

    for number in range(3):
        y = apply(x, number, None)
        in_all = np.broadcast_to(want[number], (SEQUENCES, TOKENS))
        assert_array_equal(experts_of(y, outputs), in_all)
    assert len({tuple(np.asarray(w)) for w in want}) == 3
    later = jnp.broadcast_to(jnp.arange(5, 12), (SEQUENCES, 7))
    assert_allclose(apply(x[:, 5:], 2, later), y[:, 5:], atol=1e-6)


def test_sequences_at_inference_draw_one_expert_per_layer():
    layer, params, x = make(inference="sequence")
    outputs, seen = by_each_expert(params, x), []
    apply = jax.jit(lambda i: layer.apply({"params": params}, x, layer_index=i)[0])
    for number in range(12):
        y = apply(number)
        (expert,) = set(experts_of(y, outputs).ravel())
        seen.append(expert)
        assert expert == draw_expert(layer_key(0, number), EXPERTS)
    other = [int(draw_expert(layer_key(1, number), EXPERTS)) for number in range(12)]
    assert len(set(seen)) > 1 and seen != other


def test_statistics_are_of_the_draw():
    layer, params, x = make(training=True)
    stats = jax.jit(layer.apply)({"params": params}, x, rngs={"experts": jax.random.key(0)})[1]
    assert_allclose(stats.load, 1 / EXPERTS)
    assert_allclose(stats.confidence_entropy, np.log(EXPERTS), rtol=1e-6)


def test_bfloat16():
    layer, params, x = make("aoe", training=True, dtype="bfloat16")
    rngs = {"experts": jax.random.key(0)}
    both = layer, layer.clone(dtype=jnp.float32)
    y, exact = (jax.jit(made.apply)({"params": params}, x, rngs=rngs)[0] for made in both)
    assert y.dtype == jnp.bfloat16
    assert_allclose(np.asarray(y, float), exact, atol=0.05 * float(jnp.abs(exact).max()))


class Step:
    """The loss of a training step of a small model, and its gradient."""

    def __init__(self, n_experts=EXPERTS, **settings):
        config = methods.get_config("thor_router")
        config.model.update(n_layers=2, n_heads=2, d_model=16, vocab_size=50, unroll=1)
        config.experts.update(n_experts=n_experts, top_k=1, d_ffn=16)
        config.routing.update(settings)
        config.data.seq_len = 8
        self.config = Config.from_config_dict(config)
        tokens = np.asarray(jax.random.randint(jax.random.key(5), (4, 9), 0, 50))
        ones = np.ones((4, 8), np.int32).copy()
        ones[0, 5:] = 0
        self.batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": ones,
            "weights": ones * 1.0,
        }
        self.params = jax.jit(lambda: init_state(self.config, 0).params)()
        self.function = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def _loss(self, params, key):
        return training_loss(self.config, params, {}, self.batch, key)

    def __call__(self, params, key=0):
        (loss, metrics), gradient = self.function(params, jax.random.key(key))
        return loss, metrics, gradient


@pytest.fixture(scope="module")
def step():
    return Step()


def test_a_single_expert_has_no_divergence():
    step = Step(n_experts=1)
    loss, metrics, _ = step(step.params)
    assert_allclose(metrics["divergence"], 0, atol=1e-6)
    assert_allclose(loss, 2 * metrics["nll"], rtol=1e-6)


def test_equal_experts_agree(step):
    experts = {
        name: jnp.broadcast_to(w[:, :1], w.shape)
        for name, w in step.params["layers"]["experts"].items()
    }
    params = step.params | {"layers": step.params["layers"] | {"experts": experts}}
    loss, metrics, _ = step(params)
    assert_allclose(metrics["divergence"], 0, atol=1e-6)
    assert_allclose(loss, 2 * metrics["nll"], rtol=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_step(step):
    """The two passes draw separately in every layer, only drawn experts learn, and alpha is the
    weight of the divergence.
    """
    sharper = jax.tree.map(lambda a: 2 * a, step.params)
    drawn = []
    for key in range(8, 16):
        loss, metrics, gradient = step(sharper, key)
        assert metrics["divergence"] >= 0
        assert_allclose(loss, 2 * metrics["nll"] + 5 * metrics["divergence"], rtol=1e-5)
        learnt = np.abs(gradient["layers"]["experts"]["w_down"]).sum(axis=(2, 3)) > 0
        for w in gradient["layers"]["experts"].values():
            assert_array_equal(np.abs(w).sum(axis=(2, 3)) > 0, learnt)
        assert set(learnt.sum(axis=1)) <= {1, 2}
        assert metrics["divergence"] > 1e-4 or learnt.sum() == 2
        drawn.append(learnt)
    assert any(one[0].tolist() != one[1].tolist() for one in drawn)
    assert any(one.sum() == 4 for one in drawn)


@pytest.mark.slow
def test_padding_does_not_count(step):
    loss = step(step.params)[0]
    step.batch["targets"] = step.batch["targets"].copy()
    step.batch["targets"][0, 5:] = 7
    again = jax.jit(step._loss)(step.params, jax.random.key(0))[0]
    assert_allclose(again, loss, rtol=1e-6)


def two_inputs(n_tokens, dtype="float32"):
    hidden, *rest = inputs(n_tokens, dtype)
    return (hidden, hidden + normal(7, hidden.shape, dtype)), *rest


def plain_passes(consistency, hidden, table, targets, weights):
    """`(loss, nll, divergence)` by the definition, whole."""
    p, q = (jax.nn.softmax(h.astype(jnp.float32) @ table.T) for h in hidden)
    divergence = 0.5 * ((p * jnp.log(p / q)).sum(axis=1) + (q * jnp.log(q / p)).sum(axis=1))
    nll, divergence = (
        sum(plain(h, table, targets, weights) for h in hidden),
        (weights * divergence).sum(),
    )
    return nll + consistency * divergence, nll, divergence


@pytest.mark.parametrize("n_tokens", [64, 61])
def test_two_passes(n_tokens, monkeypatch):
    """Sums, and the gradient of the loss by both passes and the table."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    hidden, table, *rest = two_inputs(n_tokens)

    def scaled(function):
        def value(hidden, table, scale):
            total, *parts = function(5.0, hidden, table, *rest)
            return scale * total, parts

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    got, want = scaled(consistent_cross_entropy), scaled(plain_passes)
    for scale in (1.0, -2.5):
        results = (jax.tree.leaves(function(hidden, table, scale)) for function in (got, want))
        for a, b in zip(*results, strict=True):
            assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert_allclose(
        jax.jit(consistent_cross_entropy, static_argnums=0)(5.0, hidden, table, *rest),
        plain_passes(5.0, hidden, table, *rest),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_two_passes_in_bfloat16():
    hidden, table, *rest = two_inputs(64, "bfloat16")

    def value(function):
        return jax.jit(jax.value_and_grad(lambda h, t: function(5.0, h, t, *rest)[0], (0, 1)))(
            hidden, table
        )

    (got, (d_hidden, d_table)), (want, (_, wanted)) = (
        value(consistent_cross_entropy),
        value(plain_passes),
    )
    assert (got.dtype, d_hidden[1].dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_allclose(got, want, rtol=2e-2)
    assert_allclose(d_table, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def test_logits_of_two_passes_are_never_whole():
    n_tokens, vocabulary = 4096, 8192
    hidden = (jnp.zeros((n_tokens, 8)),) * 2
    shapes = (
        hidden,
        jnp.zeros((vocabulary, 8)),
        jnp.zeros(n_tokens, jnp.int32),
        jnp.ones(n_tokens),
    )
    gradient = jax.grad(lambda *args: consistent_cross_entropy(5.0, *args)[0], (0, 1))
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * n_tokens * vocabulary * 4


def test_divergence():
    """Symmetric, never negative, the mean of both KL divergences, and 0 for equal passes, without a
    gradient then.
    """
    args = inputs(1)
    table, rest = args[1], (args[2], jnp.ones(1))

    @jax.jit
    def divergence(first, second):
        return consistent_cross_entropy(5.0, (first[None], second[None]), table, *rest)[2]

    first, second = normal(1, (2, 50, 8))
    found = jax.vmap(divergence)(first, second)
    log_p, log_q = (jax.nn.log_softmax(a @ table.T) for a in (first, second))
    kl = [(jnp.exp(a) * (a - b)).sum(axis=1) for a, b in ((log_p, log_q), (log_q, log_p))]
    assert_allclose(found, (kl[0] + kl[1]) / 2, rtol=1e-4, atol=1e-5)
    assert_allclose(found, jax.vmap(divergence)(second, first), rtol=1e-5)
    assert (found > 0).all() and not jax.vmap(divergence)(first, first).any()
    hidden, *others = inputs(64)
    alone = jax.jit(jax.grad(lambda h: loss.cross_entropy(h, *others)))(hidden)
    both = jax.jit(jax.grad(lambda h: consistent_cross_entropy(5.0, h, *others)[0]))(
        (hidden, hidden)
    )
    for gradient in both:
        assert_allclose(gradient, alone, rtol=1e-5, atol=1e-6)
