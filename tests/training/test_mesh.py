"""Training on meshes of eight devices has the same loss curve as training on one device."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.sharding import batch_sharding, make_mesh, put_batch
from aoe_jax.training.step import init_state, train_step_on
from tests.settings import config_of

pytestmark = pytest.mark.slow
STEPS = 20
SETTINGS = {"model.n_layers": 2, "model.n_heads": 8, "model.d_model": 32, "model.vocab_size": 64}
SETTINGS |= {"model.max_len": 32, "model.dtype": "float32", "data.seq_len": 16}
SETTINGS |= {"experts.n_experts": 8, "experts.top_k": 2, "experts.d_ffn": 32, "experts.d_low": 8}
SETTINGS |= {"train.steps": STEPS, "train.batch_size": 16, "train.warmup": 2 / STEPS}
SETTINGS |= {"train.learning_rate": 1e-2, "train.accumulate": 2}
SETTINGS |= {"balance.aux_weight": 0.01, "balance.aux_tokens": 0.5}
KINDS = {
    "aoe": {"experts.d_shared": 16, "experts.d_wide": 32},
    "router": {"experts.kind": "router", "experts.d_shared": 24, "experts.shared_gate": True}
    | {"model.head_dim": 6, "model.qk_norm": "head", "model.rope_share": 2 / 3}
    | {"model.n_dense_layers": 1, "model.d_dense": 40},
}


def configuration(kind):
    return config_of(SETTINGS | KINDS[kind])


def batches():
    for step in range(STEPS):
        tokens = jax.random.randint(jax.random.key(step), (2, 16, 16), 0, 8) ** 2
        yield {
            "inputs": np.asarray(tokens[0], np.int32),
            "targets": np.asarray(tokens[0] + tokens[1] // 32, np.int32),
            "segment_ids": np.ones((16, 16), np.int32),
            "weights": np.ones((16, 16), np.float32),
        }


@cache
def first_state(kind):
    """Returns the first state, computed on one device, so that it is the same for all meshes."""
    config = configuration(kind)
    return jax.device_get(jax.jit(lambda: init_state(config, 0))())


def curve(config, devices):
    """Trains, and returns `(metrics of all steps, stacked; final parameters)`."""
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        step, like = train_step_on(mesh, config)
        shardings = jax.tree.map(lambda a: a.sharding, like)
        state = jax.device_put(first_state(config.experts.kind), shardings)
        steps = []
        for batch in batches():
            state, metrics = step(state, put_batch(batch_sharding(mesh), batch))
            steps.append(jax.device_get(metrics))
    return jax.tree.map(lambda *a: np.stack(a), *steps), jax.device_get(state.params)


# tests/moe/test_parallel.py tests single layers on more meshes and with both transports.
CASES = [("aoe", (2, 2, 2, 1), "all_to_all"), ("router", (1, 2, 2, 2), "ring")]


@pytest.mark.parametrize(("kind", "shape", "transport"), CASES, ids=str)
def test_the_loss_curve_is_that_of_one_device(kind, shape, transport, ragged):
    config, mesh = configuration(kind), MeshConfig(*shape, transport=transport)
    one_device = dataclasses.replace(config, mesh=MeshConfig(data=1))
    want, want_params = curve(one_device, jax.devices()[:1])
    assert want["loss"][-1] < want["loss"][0] - 0.5
    got, params = curve(dataclasses.replace(config, mesh=mesh), jax.devices())
    for name, rtol in {"loss": 1e-5, "nll": 1e-5, "aux_loss": 1e-5, "grad_norm": 1e-3}.items():
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, err_msg=name)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
