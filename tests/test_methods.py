"""Methods of `configs/methods.py` are causal, compute the same results on a mesh, and resume with
bit-identical results. So does AoE with Muon and `train.skip_above`.
"""

import dataclasses
import json
import os
from functools import cache, lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.config.training import CheckpointConfig
from aoe_jax.model.declared import state_shardings
from aoe_jax.model.decoder import Decoder
from aoe_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, with_shardings
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.step import init_state, make_train_step
from configs import methods
from tests.arrays import assert_equal, normal

STEPS, BATCH, LENGTH = 4, 8, 16
SMALL = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "vocab_size": 64}
    | {"max_len": 32, "unroll": 1},
    "experts": {"n_experts": 4, "d_ffn": 16, "d_low": 4, "round_to": 2},
    "data": {"seq_len": LENGTH},
    "train": {"steps": STEPS, "batch_size": BATCH, "warmup": 1 / STEPS, "learning_rate": 1e-2},
}
# Smaller settings, so that changes that usually need many steps happen within four steps.
SOONER = {
    "threshold": {"warmup_steps": 2, "decay": 0.5},
    # The number of experts is updated after step 3.
    "dynmoe": {"initial_experts": 2, "period_steps": 3, "idle_steps": 1, "record_steps": 2},
    "routing_free": {"threshold": 1.5, "multiplier": 0.1, "rate": 0.5},
    "smear": {"segment": 4},
}


@cache
def configuration(variant, tied=True):
    config = methods.get_config("top_k" if variant == "muon" else variant)
    if variant == "muon":
        config.train.update(optimizer="muon", skip_above=1e3)
    for group, values in SMALL.items():
        config[group].update(values)
    if config.experts.kind != "aoe":
        config.experts.round_to = 1
    config.routing.update(SOONER.get(config.routing.name, {}))
    config.model.tie_embeddings = tied
    config.train.accumulate = 2 if variant.endswith("_router") else 1
    return Config.from_config_dict(config)


def batches():
    for step in range(STEPS):
        tokens = np.random.default_rng(step).integers(0, 64, (BATCH, LENGTH + 1)).astype(np.int32)
        segments = np.ones((BATCH, LENGTH), np.int32)
        segments[-1, -3:] = 0
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segments,
            "weights": segments.astype(np.float32),
        }


class Run:
    """Runs training steps of a method on a mesh."""

    def __init__(self, config, devices):
        self.mesh = make_mesh(config, devices)
        with jax.set_mesh(self.mesh):
            first = jax.eval_shape(lambda: init_state(config, 0))
            self.shardings = state_shardings(self.mesh, first)
            self.abstract = with_shardings(first, self.shardings)
            self.step = jax.jit(
                make_train_step(config), out_shardings=(self.shardings, replicated(self.mesh))
            )

    def put(self, state):
        return jax.device_put(state, self.shardings)

    def take(self, state, batches):
        """Runs one step per batch; returns `(state, losses)`."""
        losses = []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                state, metrics = self.step(state, put_batch(batch_sharding(self.mesh), batch))
                losses.append(float(metrics["loss"]))
        return state, losses


# Methods whose layers tests/methods/ tests on norms and on logits are tested here on one of them.
# The last eight are parts that other variants and test files train: usual routers and losses.
LEFT_OUT = (
    *("top_p", "expert_choice_router", "threshold", "quantile", "dynmoe", "routing_free", "switch"),
    *("gshard_router", "z_loss", "sequence_balance_router", "loss_free", "smear_router", "thor"),
    "da_moe_router",
    *("top_k_router", "whole_gate", "top_p_router", "expert_choice"),
    *("switch_router", "z_loss_router", "sequence_balance", "loss_free_router"),
    "top_k",  # "muon" has its layers, and training/test_mesh.py trains them with AdamW
)
# The fast tier tests AoE with Muon, and a method with hooks with AdamW.
FAST = ("muon", "da_moe")
VARIANTS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in ("muon", *methods.VARIANTS)
    if name not in LEFT_OUT
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """All tests of a variant run before the next variant, so JAX's caches are cleared after it."""
    yield request.param
    jax.clear_caches()


@lru_cache(maxsize=1)
def alone(variant):
    """Trains on one device; returns `(Run, first state, states after each half, losses)`."""
    config = dataclasses.replace(configuration(variant), mesh=MeshConfig(data=1))
    run = Run(config, jax.devices()[:1])
    first = jax.device_get(jax.jit(lambda: init_state(config, 0))())
    some = list(batches())
    half, losses = run.take(run.put(first), some[: STEPS // 2])
    end, more = run.take(half, some[STEPS // 2 :])
    return run, first, (half, end), losses + more


@lru_cache(maxsize=1)
def on_a_mesh(variant):
    """The `Run` of a variant on eight devices along three axes."""
    config = dataclasses.replace(configuration(variant), mesh=mesh_of(variant))
    return Run(config, jax.devices())


GOLDENS = Path(__file__).with_name("goldens.json")


def test_losses_are_those_that_were_recorded(ragged, variant):
    """Compares the losses of four steps on one device. To record new losses, run
    `RENEW_GOLDENS=1 pytest tests/test_methods.py -k recorded -n 0`.
    """
    losses, goldens = alone(variant)[3], json.loads(GOLDENS.read_text())
    if os.environ.get("RENEW_GOLDENS"):
        lines = (f' "{name}": {json.dumps(v)}' for name, v in (goldens | {variant: losses}).items())
        GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    assert_allclose(losses, goldens[variant], rtol=1e-5)


MESHES = (
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=2, fsdp=1, expert=2, tensor=2),
)


def mesh_of(variant):
    return MESHES[["muon", *methods.VARIANTS].index(variant) % 2]


@pytest.mark.slow
def test_the_same_on_a_mesh(ragged, variant):
    """Losses, parameters and state on a mesh equal those on one device."""
    _, first, (_, want), losses = alone(variant)
    run = on_a_mesh(variant)
    state, found = run.take(run.put(first), batches())
    assert np.isfinite(losses).all() and losses[-1] != losses[0]
    assert_allclose(found, losses, rtol=2e-5)
    state, want = jax.device_get((state, want))
    near = partial(assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, state.routing_state, want.routing_state)
    # Gradients near 0 may differ in sign, but their updates have full size.
    jax.tree.map(partial(assert_allclose, atol=1e-2), state.params, want.params)
    # The moments are compared too, because AdamW's updates do not show a wrong constant factor.
    for a, b in zip(*map(jax.tree.leaves, (state.opt_state, want.opt_state)), strict=True):
        assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max())


@pytest.mark.slow
def test_resumed_bit_for_bit(ragged, tmp_path, variant):
    """A resumed run ends in the same state, and its checkpoint can be restored on a mesh."""
    run, _, (half, want), losses = alone(variant)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open(CheckpointConfig())
    checkpoints.save(STEPS // 2, half, Progress(1.0, 2.0))
    checkpoints.close()
    there = on_a_mesh(variant)
    moved = Checkpoints(tmp_path).restore_newest(there.abstract)[1]
    assert jax.tree.map(lambda a: a.sharding, moved) == there.shardings
    assert_equal(jax.device_get(moved), jax.device_get(half))
    state = Checkpoints(tmp_path).restore_newest(run.abstract)[1]
    state, found = run.take(state, list(batches())[STEPS // 2 :])
    assert found == losses[STEPS // 2 :]
    assert_equal(jax.device_get(state), jax.device_get(want))


# These have equal logits in training and evaluation. Other methods are tested in both modes.
SAME_IN_TRAINING = ("erc", "uoe", "routing_free", "da_moe", "sigmoid_top_k")


@pytest.mark.slow
def test_no_token_depends_on_later_ones(ragged, variant):
    """Values and gradients do not depend on later tokens. Every position has its own token, so each
    embedding is used once. Methods that become causal at some step are tested after this step, and
    for methods that are never causal the test must find a dependence.
    """
    config = configuration(variant, tied=False)
    trained = alone(variant)[2][1]
    tokens, at = jnp.arange(2 * LENGTH).reshape(2, LENGTH), LENGTH // 2
    drawn, output = normal(0, (2, 64, 16))
    params = trained.params | {"output": {"embedding": output}}

    def of_one_token(training, table, tokens):
        model = {"params": params | {"embed": {"embedding": table}}}
        rngs = {"experts": jax.random.key(1)}
        decoder = Decoder.from_config(config, training=training)
        logits = decoder.apply(model, tokens, routing_state=trained.routing_state, rngs=rngs)[0]
        return (logits[0, at] ** 2).sum(), logits

    is_same = variant.removesuffix("_router") in SAME_IN_TRAINING
    for training in (False,) if is_same else (False, True):
        step = jax.jit(jax.grad(partial(of_one_token, training), has_aux=True))
        by_token, before = step(drawn, tokens)
        by_token = np.abs(by_token).sum(axis=1)
        _, after = step(drawn, tokens.at[0, at + 1 :].set(63).at[1].set(62))
        assert by_token[tokens[0, at]] > 0 and np.abs(before - after).max() > 1e-3
        moved = np.abs(before[0, : at + 1] - after[0, : at + 1]).max()
        assert (moved < 1e-5) == is_causal(config)
        if is_causal(config):
            assert not by_token[tokens[0, at + 1 :]].any() and not by_token[tokens[1]].any()


def is_causal(config):
    causality = config.routing.causality(config.experts)
    return not causality.reason or causality.until_step is not None
