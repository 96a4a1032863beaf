"""How the parameters of a model are split over devices."""

import dataclasses
import math

import jax
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.model.declared import declared, state_shardings
from aoe_jax.sharding import make_mesh, with_shardings
from aoe_jax.storage.config_files import default_config
from aoe_jax.training.step import init_state


def configuration(kind="aoe", **mesh):
    config = default_config()
    config.experts.update(kind=kind)
    if kind == "aoe":
        config.experts.d_wide = 512
    if kind == "dense":
        config.balance.aux_weight = 0.0
    return dataclasses.replace(Config.from_config_dict(config), mesh=MeshConfig(**mesh))


SHARES = {
    "aoe": ((2, 2, 2), {"w_gate_down": 4, "w_gate_up": 8, "w_up": 8, "w_down": 8}),
    "router": ((2, 2, 2), {"w_router": 1, "w_gate": 8, "w_up": 8, "w_down": 8}),
    "dense": ((2, 1, 4), {"w_gate": 8, "w_up": 8, "w_down": 8}),
}


@pytest.mark.parametrize("kind", SHARES)
def test_each_device_has_its_share_from_the_start(kind):
    (fsdp, expert, tensor), wanted = SHARES[kind]
    config = configuration(kind, data=1, fsdp=fsdp, expert=expert, tensor=tensor)
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        first = jax.eval_shape(lambda: init_state(config, 0))
        state = with_shardings(first, state_shardings(mesh, first))
    layers = state.params["layers"]
    shares = jax.tree.map(lambda a: a.size / math.prod(a.sharding.shard_shape(a.shape)), layers)
    assert shares["experts"] == wanted
    moments = state.opt_state[1][0].mu["layers"]
    assert jax.tree.map(lambda a: a.sharding, moments) == jax.tree.map(lambda a: a.sharding, layers)
    sizes = jax.tree.map(lambda a: a.size, layers)
    held = jax.tree.map(lambda size, share: size / share, sizes, shares)
    assert sum(jax.tree.leaves(held)) < 0.3 * sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("layers/experts/w_gate_up", ((-2,), (-1,))),
        ("layers/experts/w_shared_down", ((-2,), (-1,))),
        ("dense_layers/experts/w_up", ((-2,), (-1,))),
        ("layers/attention/k", ((-3,), (-2, -1))),
        ("layers/attention/o", ((-3, -2), (-1,))),
        ("layers/experts/w_router", None),
        ("layers/attention/q_bias", None),
        ("embed/embedding", None),
    ],
)
def test_matrices_of_experts_and_attention(path, axes):
    assert declared(path).matrix_axes == axes


def test_an_unknown_parameter_is_refused():
    mesh = make_mesh(configuration(data=8), jax.devices())
    with pytest.raises(ValueError, match="w_new is not declared"):
        state_shardings(mesh, {"w_new": jax.ShapeDtypeStruct((3, 4), "float32")})
