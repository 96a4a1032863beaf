"""Counts without allocating, against the paper's figures and against the model itself."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from aoe_jax import Decoder
from aoe_jax.config.run import Config
from aoe_jax.model.counts import (
    log_run,
    parameter_counts,
    training_flops_per_token,
)
from aoe_jax.storage.config_files import update_groups
from aoe_jax.training.step import init_state, make_train_step
from configs import methods, paper, tiny

pytestmark = pytest.mark.usefixtures("ragged")
FILES = {"paper": paper, "tiny": tiny, "methods": methods}
ALL = {f"{file}:{name}": module for file, module in FILES.items() for name in module.VARIANTS}


def config_of(name):
    return Config.from_config_dict(ALL[name].get_config(name.split(":")[1]))


def declared(config):
    """The parameters of the decoder as Flax makes them, without values."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.tree.leaves(
        jax.eval_shape(Decoder.from_config(config).init, jax.random.key(0), tokens)
    )


def moe(group="model", **changes):
    config = config_of("tiny:moe")
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **changes)}
    )


HUB = [  # what models of the hub have
    {"n_kv_heads": 2, "qk_norm": "all"},
    {"n_kv_heads": 2, "qk_norm": "head", "head_dim": 48},
    {"n_kv_heads": 2, "qkv_bias": True},
    {"n_kv_heads": 2, "head_dim": 16, "attention_bias": True, "tie_embeddings": False},
]


@pytest.mark.parametrize("name", [*ALL, *HUB], ids=str)
def test_every_variant_builds_and_counts_agree(name):
    config = moe(**name) if isinstance(name, dict) else config_of(name)
    parameters = declared(config)
    assert sum(a.size for a in parameters) == parameter_counts(config).total
    assert {a.dtype for a in parameters} == {jnp.dtype("float32")}


@pytest.mark.parametrize("added", ["a shared expert", "dense layers in front"])
def test_what_every_token_uses_is_active(added):
    usual = moe()
    if added == "a shared expert":
        config = moe("experts", d_shared=48, shared_gate=True)
        matrices, others, of_scores = 4 * (3 * 48 + 1) * 128, 0, 0
    else:
        config = moe(n_dense_layers=2, d_dense=48)
        matrices, others = 2 * (4 * 128 * 128 + 3 * 128 * 48), 2 * 2 * 128  # matrices and norms
        of_scores = 2 * 128 * config.data.seq_len
    counts, without = parameter_counts(config), parameter_counts(usual)
    assert sum(a.size for a in declared(config)) == counts.total
    assert counts.total - without.total == counts.active - without.active == matrices + others
    flops = training_flops_per_token(config) - training_flops_per_token(usual)
    assert flops == 6 * (matrices + of_scores)


@pytest.mark.parametrize("name", ["methods:top_p", "methods:top_p_router"])
def test_flops_count_the_experts_that_tokens_took(name):
    config = config_of(name)
    more = dataclasses.replace(config, experts=dataclasses.replace(config.experts, top_k=3))
    two, between, three = (training_flops_per_token(config, taken) for taken in (2.0, 2.5, 3.0))
    assert two == training_flops_per_token(config) < three == training_flops_per_token(more)
    assert between == (two + three) / 2


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("paper:moe_aux", "732M", "247M"),
        *((f"paper:aoe_r{r}_aux", "732M", "247M") for r in paper.RANKS),
        ("paper:moe_4b", "3.97B", "1.18B"),
        ("paper:aoe_4b", "3.97B", "1.18B"),
    ],
)
def test_the_papers_figures(name, total, active):
    """Total with the shared table once, active with the table as input and as output."""

    def rounded(count):
        return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"

    counts = parameter_counts(config_of(name))
    assert (rounded(counts.total), rounded(counts.active)) == (total, active)


def test_parts_and_totals():
    """The paper's parts of a model, the parameters of a large router, and equal baselines."""
    counts = parameter_counts(config_of("paper:moe"))
    parts = (counts.attention, counts.embedding, counts.experts)  # experts with 0.07M of routers
    assert [round(count / 1e6, 1) for count in parts] == [28.3, 24.6, 679.6]
    of_tables = "24.58M in embeddings (one table for input and output)"
    of_layers = "707.88M in layers, of which 198.27M are active per token"
    assert str(counts) == f"732.46M parameters: {of_tables}, and {of_layers}"
    large = parameter_counts(config_of("paper:moe_aux_large_router")).experts
    wanted = 12 * 8 * 256 * 768
    assert abs(large - counts.experts + 12 * 8 * 768 - wanted) < 0.001 * wanted
    totals = [parameter_counts(config_of(f"tiny:{name}")).total for name in ("aoe", "moe", "dense")]
    assert max(totals) / min(totals) < 1.002


def matmul_flops(jaxpr):
    """FLOPs of all matrix products of a program; the body of a loop counts once per iteration."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general"):
            groups, numbers = (), eqn.params.get("dimension_numbers")
            if eqn.primitive.name == "ragged_dot_general":
                ragged = eqn.params["ragged_dot_dimension_numbers"]
                groups, numbers = ragged.rhs_group_dimensions, ragged.dot_dimension_numbers
            lhs, rhs = (operand.aval.shape for operand in eqn.invars[:2])
            # Axes of the right operand that are contracted, or batch or group axes.
            used = {axis for lists in numbers for axis in lists[1]} | set(groups)
            free = [size for axis, size in enumerate(rhs) if axis not in used]
            total += 2 * math.prod(lhs) * math.prod(free)
        elif inner := [matmul_flops(inner) for inner in jaxprs_in_params(eqn.params)]:
            # The number of iterations of a `while` is unknown.
            assert eqn.primitive.name != "while" or not any(inner)
            of_branches = max(inner) if eqn.primitive.name == "cond" else sum(inner)
            total += eqn.params.get("length", 1) * of_branches
    return total


def computed_beyond_useful(config):
    """FLOPs per token of a training step that `training_flops_per_token` does not count.

    A block of attention multiplies all its queries with the keys of its last query, and the
    backward pass computes the scores again: 7 products over blocks instead of 6 over half the
    square. The backward pass computes the coupling loss again. Sparse scoring computes the chosen
    activations again; with a balance loss it scores the sampled tokens again, and both gradients
    include the chosen experts. With capacity, experts also process their empty places, and dispatch
    and combine are 2 and 3 products over all tokens, experts and places of a sequence.
    """
    m, c, length = config.model, config.experts, config.data.seq_len
    size = max(64, -(-length // 8))
    area = sum(
        min(size, length - first) * min(first + size, length) for first in range(0, length, size)
    )
    attention = 2 * m.d_model * (7 * area / length - 6 * length / 2) * config.routing.hooks.passes
    if config.routing.name == "erc":
        of_loss = 2 * c.n_experts**2 * m.d_model * c.d_ffn / config.tokens_per_step
        return m.n_layers * (attention + of_loss)
    if c.kind == "capacity":
        places = c.n_experts * config.routing.places(length, c)
        empty = 6 * (places / length - c.top_k) * 3 * m.d_model * c.d_ffn
        return m.n_layers * (attention + empty + 10 * places * m.d_model)
    if not c.sparse_scoring(config.routing):
        return m.n_layers * attention
    expert = 2 * c.d_low * m.d_model
    sampled = config.balance.aux_tokens if config.balance.has_loss else 0
    return m.n_layers * (
        attention + c.top_k * expert + sampled * (c.n_experts + 2 * c.top_k) * expert
    )


STEPS = {
    "sparse scoring, no loss": ("published", {"balance": {"aux_weight": 0.0}}),
    "sparse scoring, loss of an eighth": ("published", {}),
    "sparse scoring, loss of all": ("published", {"balance": {"aux_tokens": 1.0}}),
    "dense scoring": ("published", {"experts": {"score_gradient": "dense"}}),
    "weights over all": ("published", {"routing": {"name": "top_k", "norm_topk_prob": False}}),
    "router": ("moe", {}),
    "capacity": (
        "moe",
        {"experts": {"kind": "capacity"}, "routing": {"name": "capacity", "capacity_factor": 1.3}},
    ),
    "uoe": (
        "published",
        {"experts": {"kind": "uoe"}, "routing": {"name": "uoe", "routing_neurons": 40}},
    ),
    "merged": ("methods:smear_router", {}),
    "merged by norms": ("methods:smear", {}),
    "two passes": ("methods:thor", {}),
    "coupled router": ("moe", {"experts": {"n_experts": 32}, "routing": {"name": "erc"}}),
    "dense": ("dense", {}),
    "accumulated": ("published", {"train": {"accumulate": 2}}),
    "longer than a block": ("published", {"data": {"seq_len": 768}, "model": {"max_len": 768}}),
}


@pytest.mark.parametrize("name", STEPS)
def test_flops_of_a_whole_training_step(name):
    """All products of a step are useful or in `computed_beyond_useful`."""
    variant, changes = STEPS[name]
    file, _, variant = variant.rpartition(":")
    settings = FILES[file or "tiny"].get_config(variant)
    settings.train.optimizer = "adamw"  # Muon's own products are no FLOPs of the model
    update_groups(settings, changes)
    config = Config.from_config_dict(settings)
    shape = (config.train.batch_size, config.data.seq_len)
    names = ("inputs", "targets", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(lambda: init_state(config, 0))
    program = jax.make_jaxpr(make_train_step(config))(state, batch)
    counted = matmul_flops(program.jaxpr) / math.prod(shape)
    useful = training_flops_per_token(config)
    assert counted - computed_beyond_useful(config) == pytest.approx(useful, rel=0.002)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("top_k", ""),
        ("threshold", "threshold is not causal before step 200: "),
        ("expert_choice", "expert_choice is not causal: "),
    ],
)
def test_a_warning_if_losses_depend_on_later_tokens(caplog, variant, words):
    groups = methods.get_config(variant)
    if variant == "threshold":
        groups.routing.warmup_steps = 200
    log_run(Config.from_config_dict(groups))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (1 if words else 0)
    assert all(warning.startswith(words) for warning in warnings)
