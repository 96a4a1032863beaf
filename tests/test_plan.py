"""Plans for machines that aren't here: what they count, what they refuse, and what the programs communicate."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from aoe_jax.config import Config, MeshConfig, default_config
from aoe_jax.counts import training_flops_per_token
from aoe_jax.plan import candidates, collectives, plan, train_step_for
from aoe_jax.sharding import MESH_AXES, batch_sharding, fill_mesh, make_mesh, rows_of_process
from aoe_jax.topology import topology_devices
from tests.runs import run, scratch


def configuration(kind="aoe", mesh=(1, 1, 1, 1), transport="ring", **experts):
    """Every size is another, so that a shape says what it is."""
    config = default_config()
    config.model.update(
        n_layers=3, n_heads=8, d_model=160, vocab_size=1031, max_len=64, dtype="bfloat16", remat="layer"
    )
    config.experts.update(kind=kind, n_experts=16, top_k=2, d_ffn=224, **experts)
    if kind == "aoe":
        config.experts.update(d_low=48, d_wide=232)
    config.data.seq_len = 64
    config.train.batch_size = 32
    config.balance.update(aux_weight=0.0, bias_rate=0.01)
    config = Config.from_config_dict(config)
    return dataclasses.replace(config, mesh=MeshConfig(*mesh, transport=transport))


def traced(config, devices):
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        step, state, batch = train_step_for(config, mesh)
        return step.trace(state, batch), mesh


def counted(config):
    """`{(kind, axes): count}` of what moves arrays; sums of scalars and statistics are left out."""
    program, mesh = traced(config, jax.devices())
    sizes = dict(zip(MESH_AXES, mesh.devices.shape, strict=True))
    found = collectives(program.jaxpr.jaxpr, sizes)
    return {key: value for key, value in found.items() if value[1] > 20_000 * value[0]}


def test_data_parallel_only_sums_gradients():
    found = counted(configuration(mesh=(8, 1, 1, 1)))
    assert {kind for kind, _ in found} == {"psum"}


@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_fsdp_gathers_weights_and_scatters_their_gradients(kind):
    config = configuration(kind, mesh=(1, 8, 1, 1))
    found = counted(config)
    assert {kind for kind, _ in found} == {"all_gather", "reduce_scatter"}
    weights = {"aoe": 4, "router": 3}[kind] + 4  # of experts and attention
    # One gradient each, and of the table one from the embedding and one from the loss.
    assert found["reduce_scatter", ("fsdp",)][0] == 3 * weights + 2


def collective_shapes(text):
    """`[(kind, shape)]` of a compiled program; a tuple counts element by element."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(", line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], tuple(map(int, shape.split(","))) if shape else ()))
    return found


@pytest.mark.parametrize("transport", ["ring", "all_to_all"])
@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_expert_parallelism_moves_tokens_and_no_weights(kind, transport):
    """In the program as compiled: no weight of an expert is gathered, but Wdown where that is leaner than gathering tokens,
    and no cache `[T, n, r]` is summed."""
    config = configuration(kind, mesh=(1, 1, 8, 1), transport=transport)
    program, _ = traced(config, jax.devices())
    found = collective_shapes(program.lower().compile().as_text())
    assert found
    for name, shape in found:
        gathers_w_down = transport == "all_to_all" and shape == (16, 160, 48)
        assert gathers_w_down or not {224, 232, 48} & set(shape), (name, shape)
    kinds = {name for name, shape in found if 160 in shape and 1031 not in shape}
    if transport == "ring":
        assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    else:
        assert "all-to-all" in kinds


def test_collectives_of_loops_count_as_often_as_they_run():
    def step(x):
        def body(carry, _):
            gathered = jax.lax.all_gather(carry, "data", axis=0, tiled=True)
            return jax.lax.psum_scatter(gathered, "data", scatter_dimension=0, tiled=True), None

        return jax.lax.scan(body, x, None, length=5)[0]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    program = jax.make_jaxpr(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(
        np.zeros((64, 3), np.float32)
    )
    found = collectives(program.jaxpr, {"data": 8})
    size = 64 * 3 * 4 * 7 / 8
    assert found == {("all_gather", ("data",)): [5, 5 * size], ("reduce_scatter", ("data",)): [5, 5 * size]}


def test_a_plan_for_four_chips():
    generation, devices = topology_devices("v5e:2x2")
    config = fill_mesh(configuration(mesh=(-1, 2, 1, 1)), len(devices))
    report = plan(config, generation, devices)
    assert report["fits"] and report["devices"] == 4
    assert report["mesh"] == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1, "transport": "ring"}
    memory, tokens = report["memory_bytes"], 32 * 64
    # Parameters and two moments, in float32, of which every array but norms and biases is halved.
    assert memory["state"] == pytest.approx(12 * report["parameters"] / 2, rel=0.01)
    assert memory["state"] + memory["temp"] <= memory["total"] * 1.01 < report["hbm_bytes"]
    assert report["flops"]["useful"] == tokens * training_flops_per_token(config) / 4
    # Layers are computed again in the backward pass, and all else is what it should be.
    assert 1.1 < report["flops"]["compiled"] / report["flops"]["useful"] < 1.6
    assert report["step_seconds"] == max(report["seconds"].values()) and 0 < report["mfu_bound"] <= 1


def test_nearest_meshes_come_first():
    config = configuration(mesh=(8, 1, 1, 1))
    found = [tuple(getattr(c.mesh, axis) for axis in MESH_AXES) for c in candidates(config, 8)]
    assert found[0] == (4, 2, 1, 1) and len(set(found)) == len(found) and (8, 1, 1, 1) not in found
    assert all(np.prod(shape) == 8 for shape in found)


def planned(*arguments):
    return run(["-m", "aoe_jax.plan", "--config=configs/tiny.py", "--config.model.unroll=1", *arguments])


def test_the_command_line():
    file = scratch("plan") / "report.json"
    status, stdout, stderr = planned("--topology=v5e:2x2", f"--json={file}", "--config.mesh.fsdp=4")
    assert status == 0, stderr
    assert "fits" in stdout and "all_gather" in stdout
    assert json.loads(file.read_text())["mesh"]["fsdp"] == 4


def test_what_does_not_fit_is_status_3():
    huge = ["--config.model.d_model=8192", "--config.experts.d_low=2048", "--config.experts.d_ffn=32768"]
    status, stdout, stderr = planned("--topology=v5e:2x2", "--config.train.batch_size=4", *huge)
    assert status == 3, stdout + stderr
    assert "DOES NOT FIT" in stdout


def test_a_slice_that_there_is_not():
    status, stdout, stderr = planned("--topology=v5e:3x5")
    assert status == 2 and stdout == ""
    assert "error: --topology=v5e:3x5: the compiler has no such slice" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("mesh", [(-1, 8, 1, 1), (-1, 4, 2, 1), (-1, 1, 1, 4), (-1, 2, 2, 4)])
def test_the_hosts_of_a_slice_read_whole_batches(mesh):
    """However the network lays out a mesh, and though the rows of a host need not be neighbours."""
    _, devices = topology_devices("v5e:4x4")
    config = fill_mesh(dataclasses.replace(configuration(), mesh=MeshConfig(*mesh)), len(devices))
    sharding = batch_sharding(make_mesh(config, devices))
    rows = [rows_of_process(sharding, 32, process) for process in range(4)]
    assert set().union(*rows) == set(range(32))
    assert all(len(mine) == len(set(mine)) for mine in rows)
    per_host = 32 // (len(devices) // config.mesh.tensor)
    assert all(len(mine) % per_host == 0 for mine in rows)
