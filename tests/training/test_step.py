"""The train step: small versions of all configurations of the paper, the optimiser, and gradient
accumulation.
"""

import dataclasses
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.config.training import TrainConfig
from aoe_jax.methods import find_method
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.load_balance import balance_loss, load_spread
from aoe_jax.moe.routing import TopK
from aoe_jax.planning.step_plan import abstract_batch
from aoe_jax.sharding import fill_mesh, make_mesh
from aoe_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from aoe_jax.training.step import init_state, is_spike, make_train_step, training_loss
from aoe_jax.training.validation import compile_eval_step
from configs import paper

pytestmark = pytest.mark.usefixtures("ragged")

SMALL = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "vocab_size": 61, "dtype": "float32"}
    | {"remat": "none"},
    "experts": {"d_ffn": 48, "n_experts": 4},
    "data": {"seq_len": 24},
    "train": {"batch_size": 4, "warmup": 0.3, "steps": 3},
}


def batch_of(batch_size=4):
    tokens = jax.random.randint(jax.random.key(0), (batch_size, 25), 0, 61)
    ones = jnp.ones((batch_size, 24))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones}
    return batch | {"segment_ids": ones.astype(jnp.int32)}


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def new_state(config):
    return jax.jit(lambda: init_state(config, 0))()


def shrunken(variant, **changes):
    """Returns a small version of a configuration of the paper. `d_low` is reduced in proportion to
    `d_model`. `changes` are `group={field: value}`.
    """
    config = paper.get_config(variant)
    d_low = max(4, round((config.experts.d_low or 0) * 32 / config.model.d_model))
    for group, values in SMALL.items():
        config[group].update(values)
    config.experts.update(d_low=d_low, d_wide=None)
    settings = Config.from_config_dict(config).to_dict()
    for group, values in changes.items():
        settings[group] |= values
    return Config.from_config_dict(settings)


# Their small versions are those of other variants, except for `d_low`.
ALIKE = ("aoe_r128", "aoe_r256", "aoe_r512", "moe_4b", "aoe_4b")
ALIKE += ("aoe_r128_aux", "aoe_r256_aux", "aoe_r512_aux")
# Their parts are those of other variants.
ALIKE += ("moe", "moe_top_p", "moe_expert_choice", "moe_aux", "aoe_r64", "moe_aux_large_router")


@pytest.mark.parametrize("variant", [name for name in paper.VARIANTS if name not in ALIKE])
def test_every_program_of_the_paper_trains(variant):
    """In three steps, every gradient is finite, and every parameter has a nonzero gradient."""
    config = shrunken(variant, model={"remat": "layer"})
    state, batch, losses = new_state(config), batch_of(), []
    step = jax.jit(make_train_step(config))
    for t in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if t == 0:
            assert metrics["finite"] and float(metrics["grad_norm"]) > 0
            # After one step, the first moment is proportional to the gradient.
            ((_, gradient),) = optax.tree.get_all_with_path(state.opt_state, "mu")
    # Embeddings are left out: tokens that do not occur in the batch have no input gradients.
    del gradient["embed"]
    for name, moment in by_path(gradient).items():
        n_axes = 2 if "experts']['w_" in name and "router" not in name else 1  # layer, expert
        stacked = moment.reshape(*moment.shape[:n_axes], -1)
        assert (np.abs(stacked).max(axis=-1) > 0).all(), name
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    assert int(state.step) == 3


TRACED = ("aoe_r64", "moe_aux_factorised", "aoe_whole_aux", "aoe_expert_choice", "aoe_4b")


@pytest.mark.parametrize("variant", [*TRACED, "moe_4b_muon"])
def test_configurations_of_the_paper_are_traced(variant):
    """At full size, the state after a step has the shapes and dtypes of the state before."""
    config = Config.from_config_dict(paper.get_config(variant))
    state = jax.eval_shape(lambda: init_state(config, 0))
    batch = abstract_batch(config)
    after, metrics = jax.eval_shape(make_train_step(config), state, batch)
    before, after = (jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after))
    assert after == before
    assert metrics["load"].shape == (config.model.n_layers, config.experts.n_experts)


def test_losses_are_weighted_as_configured():
    """The gradient is the same for both values of `score_gradient`."""
    batch, params, found = batch_of(), new_state(shrunken("aoe_r64_aux")).params, []
    balance = {"aux_weight": 0.5, "entropy_weight": 0.125, "z_weight": 0.25}
    plain = shrunken("aoe_r64_aux", balance=dict.fromkeys(balance, 0.0))
    plain = jax.jit(lambda: training_loss(plain, params, {}, batch, None)[1])()
    np.testing.assert_allclose(plain["loss"], plain["nll"], rtol=1e-6)
    for kind in ("sparse", "dense"):
        experts, of_each = {"score_gradient": kind}, balance | {"aux_batch": "sequence"}
        loss = partial(training_loss, shrunken("aoe_r64_aux", balance=of_each, experts=experts))
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, metrics), grads = gradient(params, {}, batch, None)
        found.append(grads)
        np.testing.assert_allclose(metrics["nll"], plain["nll"], rtol=1e-5)
        weighted = 0.5 * metrics["aux_loss"] + 0.25 * metrics["z_loss"]
        weighted += 0.125 * metrics["confidence_entropy"].mean()
        np.testing.assert_allclose(metrics["loss"], metrics["nll"] + weighted, rtol=1e-5)
        of_batch = balance_loss(metrics["load"], metrics["stats"].mean_probability).mean()
        np.testing.assert_allclose(plain["aux_loss"], of_batch, rtol=1e-5)
        # The loss is K in perfect balance and 4 in collapse, and larger for single sequences.
        assert 2 < float(of_batch) < float(metrics["aux_loss"]) < 4
        assert float(metrics["z_loss"]) > np.log(4) ** 2  # norms are never negative
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *found)


@cache
def loss_free(variant, accumulate=1):
    """`(config, step, first state)` of training with loss-free balancing, compiled once for all
    tests that need one.
    """
    config = shrunken(variant, balance={"bias_rate": 0.1}, train={"accumulate": accumulate})
    return config, jax.jit(make_train_step(config)), new_state(config)


@pytest.mark.parametrize("variant", ["aoe_r64", "moe_aux"])
def test_loss_free_balancing(variant):
    """The load of a step changes the bias of the next step, in units of the spread of scores."""
    _, step, state = loss_free(variant)
    batch = batch_of()
    np.testing.assert_array_equal(state.routing_state["selection_bias"], np.zeros((2, 4)))
    spreads = []
    for _ in range(30):
        before = np.asarray(state.routing_state["selection_bias"])
        state, metrics = step(state, batch)
        load, spread = np.asarray(metrics["load"]), np.asarray(metrics["score_spread"])
        want = before + 0.1 * spread[:, None] * np.sign(load.mean(axis=1, keepdims=True) - load)
        np.testing.assert_allclose(state.routing_state["selection_bias"], want, atol=1e-6)
        spreads.append(load_spread(load))
    assert np.mean(spreads[-5:]) < 0.7 * spreads[0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_step_that_is_not_finite_updates_nothing(accumulate):
    """The loss is NaN, or the loss is finite, but the float32 norm of a gradient of 1e20 is not.
    The step is counted, also for the schedule, and the next step updates parameters again.
    """
    config, step, state = loss_free("aoe_r64", accumulate)
    batch = batch_of()
    first, metrics = step(state, batch)
    assert metrics["finite"] and int(first.skipped) == int(metrics["skipped"]) == 0
    large = dict(first.params)
    large["embed"] = {"embedding": large["embed"]["embedding"] * 1e22}
    large["final_norm"] = {"scale": large["final_norm"]["scale"] * 1e-22}
    overflows = dataclasses.replace(first, params=large)
    poisoned = batch | {"weights": batch["weights"].at[0, 0].set(jnp.nan)}
    for before, of_step in ((overflows, batch), (first, poisoned)):
        second, metrics = step(before, of_step)
        assert np.isfinite(metrics["loss"]) == (before is overflows) and not metrics["finite"]
        assert int(second.step) == 2 and int(second.skipped) == int(metrics["skipped"]) == 1
        for name in ("params", "routing_state", "opt_state"):
            trees = (jax.tree.leaves(getattr(s, name)) for s in (before, second))
            for a, b in zip(*trees, strict=True):
                np.testing.assert_array_equal(b, a + (a.dtype == jnp.int32))

    third, metrics = step(second, batch)
    assert metrics["finite"] and int(third.skipped) == 1
    rate = learning_rate_schedule(config)(2)
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    changed = jax.tree.map(lambda a, b: (a != b).any(), second.params, third.params)
    assert any(jax.tree.leaves(changed))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, third.params, second.params))
    np.testing.assert_allclose(metrics["update_norm"], moved, rtol=1e-3)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(third.params), rtol=1e-5)


class Shifting(TopK):
    """A router that changes a parameter itself."""

    def update(self, config, state, stats, weights):
        return super().update(config, state, stats, weights)[0], {"w_up": weights["w_up"] + 1}


def test_spikes_of_the_gradient_are_skipped():
    """A norm is a spike if it is above the mean of recent ones by a multiple of their standard
    deviation; neither a changed level nor a spike changes that for long.
    """
    draw, recent = np.random.default_rng(0), jnp.zeros(3)
    norms = 2 + 0.1 * draw.standard_normal(200)
    norms[[20, 150]] = 3.0
    found = []
    for norm in norms:
        spike, recent = is_spike(norm, recent, 6.0)
        found.append(bool(spike))
    assert np.flatnonzero(found).tolist() == [150]
    weight = 0.01 * 0.99 ** np.arange(200)[::-1]
    norms[150] = 2 + 6 * 0.1  # counts about as the limit
    np.testing.assert_allclose(recent[:2], [weight.sum(), weight @ norms], rtol=1e-3)
    assert 0.1 < np.sqrt(recent[2] / recent[0]) < 0.2
    later = []
    for _ in range(100):
        spike, recent = is_spike(6.0, recent, 6.0)
        later.append(bool(spike))
    assert all(later[:5]) and not any(later[50:])

    config = shrunken("aoe_r64", train={"skip_above": 3.0}, balance={"bias_rate": 0.1})
    config = dataclasses.replace(config, routing=Shifting())
    state, step, batch = new_state(config), jax.jit(make_train_step(config)), batch_of()
    for level, updated in ((1e-3, False), (1e9, True)):
        state = dataclasses.replace(state, recent_norms=jnp.array([1, level, level**2]))
        new, metrics = step(state, batch)
        assert metrics["updated"] == updated and metrics["skipped"] == (not updated)
        assert metrics["finite"]
        assert abs(new.recent_norms[1] / level - 1) > 1e-3  # also after a skip
        moved = jax.tree.map(
            lambda a, b: (a != b).any(), new.opt_state[1][0].mu, state.opt_state[1][0].mu
        )
        assert any(jax.tree.leaves(moved)) == updated
        before, after = (s.params["layers"]["experts"]["w_up"].mean() for s in (state, new))
        np.testing.assert_allclose(after - before, updated, atol=0.1)
    poisoned = batch | {"weights": batch["weights"].at[0, 0].set(jnp.nan)}
    new, _ = step(state, poisoned)
    np.testing.assert_array_equal(new.recent_norms, state.recent_norms)


def masked_batch():
    """A batch with uneven weights: only one target of the first sequence counts in the loss."""
    weights = np.ones((4, 24), np.float32)
    weights[0, 1:] = 0
    weights[2, ::3] = 0
    return batch_of() | {"weights": weights}


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_masked_targets_are_no_padding(router):
    """They count in the statistics and in expert choice like other targets, but not in the loss."""
    config = dataclasses.replace(shrunken("aoe_r64_aux"), routing=find_method(router)())
    params = new_state(config).params
    whole, masked = batch_of(), masked_batch()
    loss = jax.jit(lambda batch: training_loss(config, params, {}, batch, None)[1])
    plain, with_mask = loss(whole), loss(masked)
    for name in ("load", "aux_loss", "confidence_entropy", "mean_score"):
        np.testing.assert_array_equal(plain[name], with_mask[name])
    nll = [
        float(loss(whole | {"weights": np.eye(96, dtype=np.float32)[i].reshape(4, 24)})["nll"])
        for i in np.flatnonzero(masked["weights"])
    ]
    np.testing.assert_allclose(with_mask["nll"], np.mean(nll), rtol=1e-5)
    assert loss(whole | {"weights": np.zeros((4, 24), np.float32)})["nll"] == 0
    padded = loss(masked | {"segment_ids": masked["weights"].astype(np.int32)})
    assert not np.allclose(padded["load"], plain["load"], rtol=1e-3)


def test_validation_counts_all_tokens():
    """In training, balance losses may use some of the tokens."""
    found = []
    for aux_tokens in (1.0, 0.125):
        config = shrunken("aoe_r64_aux", balance={"aux_tokens": aux_tokens})
        mesh = make_mesh(fill_mesh(config, 1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            score = compile_eval_step(Decoder.from_config(config), False, mesh)
            found.append(score(new_state(config).params, {}, batch_of())[2])
    jax.tree.map(np.testing.assert_array_equal, *found)


# router -> the balance loss, the group with its weight, and the routing statistic that it uses.
RUNNING = {
    "top_k": ("aux_loss", "balance", "load"),
    "gshard": ("first_choice_loss", "routing", "first_choices"),
}


@pytest.mark.parametrize("router", ["top_k", pytest.param("gshard", marks=pytest.mark.slow)])
def test_balance_is_of_all_micro_batches_so_far(router):
    """The loss of a micro-batch uses the load, or the first choices, of all micro-batches up to it.
    Values and gradients are compared with a computation by hand.
    """
    name, group, share = RUNNING[router]
    train = {"accumulate": 3, "batch_size": 6}
    settings = shrunken("moe_aux", balance={"aux_weight": 0.0}, train=train).to_dict()
    settings["routing"] = {"name": router}
    settings[group] |= {"aux_weight": 0.5}
    config = Config.from_config_dict(settings)
    # The second of three micro-batches has fewer tokens.
    tokens = batch_of(6)["segment_ids"].at[1, 3:].set(0)
    batch = batch_of(6) | {"segment_ids": tokens, "weights": tokens.astype(jnp.float32)}
    micro = [jax.tree.map(lambda a, m=m: a[m::3], batch) for m in range(3)]
    state = new_state(config)

    def by_hand(params):
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
        nll = loss = alone = so_far = 0
        for number, one in enumerate(micro):
            key = jax.random.fold_in(step_key, number)
            metrics = training_loss(config, params, state.routing_state, one, key)[1]
            stats = metrics["stats"]
            nll += metrics["nll"] * one["weights"].sum() / batch["weights"].sum()
            own = stats.load if share == "load" else stats.shares[share]
            so_far += jax.lax.stop_gradient(own)
            mean = so_far / (number + 1)
            loss += 4 * (mean * stats.mean_probability).sum(axis=1).mean() / 3
            alone += metrics[name] / 3
        return nll + 0.5 * loss, (loss, alone)

    gradient, (balance, alone) = jax.jit(jax.grad(by_hand, has_aux=True))(state.params)
    _, metrics = jax.jit(make_train_step(config))(state, batch)
    np.testing.assert_allclose(metrics[name], balance, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
    assert abs(balance - alone) > 1e-4


@pytest.mark.parametrize("batch", [batch_of, masked_batch])
def test_accumulation_is_the_mean_over_micro_batches(batch):
    """All targets count equally, also if micro-batches have different numbers of targets."""
    results = []
    for accumulate in (1, 4):
        _, step, state = loss_free("aoe_r64", accumulate)
        results.append(step(state, batch()))
    (one_state, one), (four_state, four) = results
    np.testing.assert_allclose(one["nll"], four["nll"], rtol=1e-5)
    np.testing.assert_allclose(one["load"], four["load"], rtol=1e-5)
    np.testing.assert_allclose(one["grad_norm"], four["grad_norm"], rtol=1e-4)
    moments = (jax.tree.leaves(state.opt_state) for state in (one_state, four_state))
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


def of_experts(**weights):
    return {"layers": {"experts": weights}}


def test_optimiser_is_the_papers():
    """Updates equal a computation by hand: clipping by the global norm, then Adam with betas
    (0.9, 0.95) and decoupled decay on matrices only.
    """
    rates = {"learning_rate": 0.1, "final_learning_rate": 0.01}
    config = Config(train=TrainConfig(steps=10, warmup=0.0, weight_decay=0.5, **rates))

    def tree(up, scale, embedding):
        rest = {"final_norm": {"scale": jnp.array([scale])}}
        rest["embed"] = {"embedding": jnp.array([[embedding]])}
        return of_experts(w_up=jnp.array([up])) | rest

    params, grads = tree([3.0, -2.0], 1.0, 4.0), tree([3.0, 4.0], 12.0, 0.0)
    optimizer = make_optimizer(config)
    state, m, v = optimizer.init(params), 0.0, 0.0
    want = np.array([[3.0, -2.0]])
    for t in (1, 2):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        clipped = np.array([[3.0, 4.0]]) / 13
        m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
        rate = float(learning_rate_schedule(config)(t - 1))
        want = want - rate * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.5 * want)
    np.testing.assert_allclose(params["layers"]["experts"]["w_up"], want, rtol=1e-5)
    np.testing.assert_allclose(params["embed"]["embedding"], [[4.0]])  # no gradient, no decay
    assert not np.allclose(want, [[3.0, -2.0]])


def test_muon_updates_each_matrix_by_itself():
    """Every matrix of an expert or of attention has the update of `optax.contrib.muon` for this
    matrix alone. Every other parameter has the update of AdamW with Nesterov momentum.
    """
    config = shrunken("aoe_r64", train={"weight_decay": 0.5, "clip_norm": 100.0})
    params = new_state(config).params
    grads = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), params)
    grads = jax.tree.map(lambda a: 99 * a / optax.tree.norm(grads), grads)

    def two_updates(optimizer):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for scale in (1.0, -0.5):
            scaled = jax.tree.map(lambda a, scale=scale: scale * a, grads)
            updates, state = update(scaled, state, params)
        return by_path(updates)

    def matrices(name, a):
        """The stacked matrices of a parameter, `[number, inputs, outputs]`."""
        if "attention" not in name:
            return a.reshape(-1, *a.shape[2:])  # layers and experts
        return a.reshape(len(a), -1, a.shape[-1] if name.endswith("['o']") else a[0, 0].size)

    schedule, alone = learning_rate_schedule(config), optax.contrib.scale_by_muon()
    update_alone = jax.jit(alone.update)
    muon = dataclasses.replace(config.train, optimizer="muon")
    by_muon = two_updates(make_optimizer(dataclasses.replace(config, train=muon)))
    by_adam = two_updates(optax.nadamw(schedule, 0.9, 0.95, weight_decay=0.5, mask=decayed))
    for name, gradient in by_path(grads).items():
        if not any(part in name for part in ("w_gate", "w_up", "w_down", "attention']")):
            np.testing.assert_allclose(by_muon[name], by_adam[name], rtol=1e-6)
            continue
        stacks = (matrices(name, a) for a in (gradient, by_path(params)[name], by_muon[name]))
        for matrix, weight, got in zip(*stacks, strict=True):
            state = alone.init(matrix)
            for scale in (1.0, -0.5):
                update, state = update_alone(scale * matrix, state)
            size = 0.2 * max(matrix.shape) ** 0.5
            want = -schedule(1) * (size * update + 0.5 * weight)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_moments_in_bfloat16(optimizer):
    """They take half the memory, and updates have the error of their rounding."""
    params = new_state(shrunken("aoe_r64")).params
    grads = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), params)
    found = {}
    for dtype in ("float32", "bfloat16"):
        train = {"optimizer": optimizer, "moments_dtype": dtype}
        rule = make_optimizer(shrunken("aoe_r64", train=train))
        state, update = jax.jit(rule.init)(params), jax.jit(rule.update)
        for _ in range(2):
            updates, state = update(grads, state, params)
        sizes = Counter()
        for a in jax.tree.leaves(state):
            sizes[str(a.dtype)] += a.size
        found[dtype] = optax.tree.norm(updates), updates, sizes
    (norm, exact, before), (_, rounded, after) = found.values()
    n_parameters = sum(a.size for a in jax.tree.leaves(params))
    assert after["bfloat16"] == before["float32"] - after["float32"] == n_parameters
    error = optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact)) / norm
    assert 1e-5 < error < 5e-3


def test_routers_alone_in_the_first_steps():
    """Other parameters stay bit-identical, and their moments start after these steps."""
    train = {"router_steps": 2, "steps": 4}
    config, batch = shrunken("moe_aux_large_router", train=train), batch_of()
    step, state = jax.jit(make_train_step(config)), new_state(config)
    for number in range(1, 5):
        before, (state, _) = by_path(state.params), step(state, batch)
        ((_, moments),) = optax.tree.get_all_with_path(state.opt_state, "mu")
        new, moments = by_path(state.params), by_path(moments)
        for name, old in before.items():
            moves = number > 2 or "['w_router" in name
            # The first step has learning rate 0.
            assert np.array_equal(new[name], old) == (not moves or number == 1), (number, name)
            assert np.any(moments[name]) == moves, (number, name)


@pytest.mark.parametrize(
    ("scored", "experts"),
    [
        ("w_gate_down", ExpertsConfig("aoe")),
        ("w_gate", ExpertsConfig("aoe", score_neurons=2)),
        ("w_router", ExpertsConfig("router")),
        ("w_router_hidden", ExpertsConfig("router", large_router=True)),
    ],
)
def test_what_scores_has_a_learning_rate_of_its_own(scored, experts):
    names = ("w_gate_down", "w_gate", "w_router", "w_up")
    names += ("w_router_hidden",) if experts.large_router else ()
    params = of_experts(**{name: jnp.arange(1.0, 7).reshape(1, 2, 3) for name in names})
    params["dense_layers"] = {"experts": {"w_gate": jnp.ones((1, 2, 3))}}
    config = Config(experts=experts, train=TrainConfig(warmup=0.0, weight_decay=0.5))

    def updates_of(config):
        optimizer = make_optimizer(config)
        return optimizer.update(params, optimizer.init(params), params)[0]

    expected = updates_of(config)
    factor = jnp.array([3, 3, 1 if scored == "w_gate" else 3])
    for name in {scored, "w_router"} if experts.large_router else {scored}:
        expected["layers"]["experts"][name] *= factor
    train = dataclasses.replace(config.train, scoring_rate=3.0)
    got = updates_of(dataclasses.replace(config, train=train))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


def test_what_decays():
    params = jax.eval_shape(lambda: init_state(shrunken("aoe_r64"), 0)).params
    assert {name for name, decays in by_path(decayed(params)).items() if not decays} == {
        "['embed']['embedding']",
        "['final_norm']['scale']",
        "['layers']['attention_norm']['scale']",
        "['layers']['experts_norm']['scale']",
    }


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("cosine", [0, 0.5, 1, 0.55, 0.1]),
        ("wsd", [0, 0.5, 1, 1, 1, 0.55, 0.1]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule, wanted):
    rates = {"learning_rate": 1.0, "final_learning_rate": 0.1, "schedule": schedule}
    train = TrainConfig(steps=100, warmup=0.1, decay=0.4, **rates)
    config = Config(train=train)
    steps = (0, 5, 10, 55, 100) if schedule == "cosine" else (0, 5, 10, 30, 60, 80, 100)
    rates = [learning_rate_schedule(config)(step) for step in steps]
    np.testing.assert_allclose(rates, wanted, atol=1e-6)
    few = Config(train=TrainConfig(steps=2, schedule="wsd", warmup=0.5, decay=0.2))
    assert (few.train.warmup_steps, few.train.decay_steps) == (1, 1)
    narrower = dataclasses.replace(train, rate_width=config.model.d_model // 4)
    schedule = learning_rate_schedule(Config(train=narrower))
    np.testing.assert_allclose([4 * schedule(step) for step in steps], wanted, atol=1e-6)
