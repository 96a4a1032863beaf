"""On which devices the parameters of a model are."""

import dataclasses
import math

import jax
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.model.declared import state_shardings
from aoe_jax.sharding import make_mesh
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


@pytest.mark.parametrize("kind", ["aoe", "router", "dense"])
def test_a_state_is_split_as_the_rules_say(kind):
    """Each device holds its share of every large array, from the start."""
    config = configuration(
        kind, data=1, fsdp=2, expert=1 if kind == "dense" else 2, tensor=4 if kind == "dense" else 2
    )
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        shardings = state_shardings(mesh, jax.eval_shape(lambda: init_state(config, 0)))
        state = jax.jit(lambda: init_state(config, 0), out_shardings=shardings)()
    experts = state.params["layers"]["experts"]
    shares = {name: a.size / a.addressable_shards[0].data.size for name, a in experts.items()}
    if kind == "dense":
        assert shares == {"w_gate": 8, "w_up": 8, "w_down": 8}
    elif kind == "router":
        assert shares == {"w_router": 1, "w_gate": 8, "w_up": 8, "w_down": 8}
    else:
        assert shares == {"w_gate_down": 4, "w_gate_up": 8, "w_up": 8, "w_down": 8}
    moments = state.opt_state[1][0].mu["layers"]["experts"]
    assert jax.tree.map(lambda a: a.sharding, moments) == jax.tree.map(
        lambda a: a.sharding, experts
    )
    held = sum(
        math.prod(a.addressable_shards[0].data.shape)
        for a in jax.tree.leaves(state.params["layers"])
    )
    assert held < 0.3 * sum(a.size for a in jax.tree.leaves(state.params["layers"]))


def test_an_unknown_parameter_is_refused():
    mesh = make_mesh(configuration(data=8), jax.devices())
    with pytest.raises(ValueError, match="w_new is not declared"):
        state_shardings(mesh, {"w_new": jax.ShapeDtypeStruct((3, 4), "float32")})
