"""Plans for machines without using them: estimates, errors, and the collectives of programs."""

import dataclasses
import math
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.moe import collectives as of_devices
from aoe_jax.planning import costs, hlo, layouts, step_plan
from aoe_jax.planning.communication import collectives, each_collective
from aoe_jax.planning.hardware import CHIPS, topology_devices
from aoe_jax.planning.step_plan import abstract_batch, plan, table
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, rows_of_process
from aoe_jax.storage.config_files import default_config
from aoe_jax.storage.files import read_json, write_json
from aoe_jax.training.step import train_step_on
from tests.in_process import call
from tests.runs import ROOT


def configuration(kind="aoe", mesh=(1, 1, 1, 1), transport="ring", **experts):
    """All sizes are different, so that the shape of an array identifies it."""
    config = default_config()
    config.model.update(n_layers=3, n_heads=8, d_model=160, vocab_size=1031, max_len=64)
    config.model.update(dtype="bfloat16", remat="layer")
    config.experts.update(kind=kind, n_experts=16, top_k=3, d_ffn=224, **experts)
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
        step, state = train_step_on(mesh, config)
        batch = abstract_batch(config, batch_sharding(mesh))
        return step.trace(state, batch), mesh


# Sizes of arrays, which identify them.
TOKENS = 32 * 64 * 160
SLOTS = 32 * 64 * 3  # (token, expert) pairs of all tokens
ROWS = SLOTS // 8 * 5 // 4  # rows that a device receives in a round of all_to_all
SCORES = 32 * 64 * 16 // 8  # scores of all tokens for the experts of one device
W_DOWN, W_UP = 16 * 160 * 48, 16 * 48 * 232
W_P, W_G = 16 * 160 * 232, 16 * 160 * 224  # w_down is as large as w_up
ROUTER, ATTENTION, TABLE = 160 * 16, 160 * 160, 1031 * 160

DATA, FSDP = ((8, 1, 1, 1), "ring"), ((1, 8, 1, 1), "ring")
RING, ALL_TO_ALL = ((1, 1, 8, 1), "ring"), ((1, 1, 8, 1), "all_to_all")

# Collectives of a layer in the forward and backward pass. The backward pass recomputes the layer,
# except for the scores.
SUMS = {("psum", ATTENTION): 4}  # gradients of q, k, v and o
IN_A_LAYER = {
    ("aoe", *DATA): SUMS | {("psum", W_DOWN): 1, ("psum", W_UP): 1, ("psum", W_P): 2},
    ("router", *DATA): SUMS | {("psum", ROUTER): 1, ("psum", W_G): 3},
    ("aoe", *FSDP): {
        # Weights are gathered in the forward pass, and again in the backward pass.
        ("all_gather", ATTENTION): 4 * 2,
        ("all_gather", W_DOWN): 2,  # once for scores, once for rows
        ("all_gather", W_UP): 2,
        ("all_gather", W_P): 2 * 2,  # w_up and w_down
        ("reduce_scatter", ATTENTION): 4,
        ("reduce_scatter", W_DOWN): 1,
        ("reduce_scatter", W_UP): 1,
        ("reduce_scatter", W_P): 2,
    },
    ("router", *FSDP): {
        ("all_gather", ATTENTION): 4 * 2,
        ("all_gather", W_G): 3 * 2,  # w_gate, w_up and w_down
        ("reduce_scatter", ATTENTION): 4,
        ("reduce_scatter", W_G): 3,
        ("psum", ROUTER): 1,
    },
    ("aoe", *RING): SUMS
    | {
        # Forward: tokens for scores and rows. Backward: tokens for rows, and output gradients.
        ("all_gather", TOKENS): 3,
        ("reduce_scatter", TOKENS): 2,  # outputs, and the tokens' gradient
        ("all_to_all", SCORES): 2,  # for the choice, and for the balance loss
        ("all_gather", SLOTS): 2,  # the chosen experts, forward and backward
        ("psum", SLOTS): 3,  # norms of chosen experts (forward, backward), and gradient
    },
    ("router", *RING): SUMS
    | {
        ("all_gather", TOKENS): 3,  # rows (forward, backward), and output gradients
        ("reduce_scatter", TOKENS): 2,
        ("all_gather", SLOTS): 4,  # the chosen experts and their weights, forward and backward
        ("reduce_scatter", SLOTS): 1,  # the weights' gradient
        ("psum", ROUTER): 1,
    },
    ("aoe", *ALL_TO_ALL): SUMS
    | {
        ("all_gather", W_DOWN): 1,  # for the scores, because it is smaller than the tokens
        # Rows are sent and returned, sent again in the backward pass, and both have gradients.
        ("ragged_all_to_all", ROWS * 160): 5,
        ("all_gather", 8 * 16): 2,  # each device's number of rows for each expert, twice
        # The norm and the weight of each row, twice, and their gradients.
        ("all_to_all", ROWS): 6,
    },
    ("router", *ALL_TO_ALL): SUMS
    | {
        ("ragged_all_to_all", ROWS * 160): 5,
        ("all_gather", 8 * 16): 2,  # each device's number of rows for each expert, twice
        ("all_to_all", ROWS): 3,  # the weight of each row, twice, and its gradient
        ("psum", ROUTER): 1,
    },
}
# Collectives of a step outside layers: the embedding table is used for inputs and for logits.
IN_A_STEP = {key: {("psum", TABLE): 2} for key in (DATA, RING, ALL_TO_ALL)}
IN_A_STEP[FSDP] = {("all_gather", TABLE): 1, ("reduce_scatter", TABLE): 2}


def larger_side(eqn):
    # Only the first operand of ragged_all_to_all is data, the others are offsets and sizes.
    operands = eqn.invars[:1] if eqn.primitive.name == "ragged_all_to_all" else eqn.invars
    return max(sum(v.aval.size for v in side) for side in (operands, eqn.outvars))


@pytest.mark.parametrize("case", IN_A_LAYER, ids=str)
def test_what_moves(case, ragged, monkeypatch):
    """Compares all collectives of the program, except for statistics and scalars, which have at
    most n numbers.
    """
    kind, mesh, transport = case
    monkeypatch.setattr(of_devices, "RAGGED_DEVICES", (jax.devices()[0].device_kind,))
    program, _ = traced(configuration(kind, mesh, transport), jax.devices())
    found, in_further_rounds = Counter(), set()
    for eqn, times in each_collective(program.jaxpr.jaxpr):
        moved = eqn.primitive.name, larger_side(eqn)
        if times == 0:
            in_further_rounds.add(moved)
        elif moved[1] > 16:
            found[moved] += times
    layers = Counter({moved: 3 * count for moved, count in IN_A_LAYER[case].items()})
    assert found == layers + Counter(IN_A_STEP[mesh, transport])
    rows = {("ragged_all_to_all", ROWS * 160), ("all_to_all", ROWS)}
    assert in_further_rounds == (rows if transport == "all_to_all" else set())


# Collectives that the TPU compiler merges: equal exchanges, and two sums that are then added.
MERGED = {
    ("aoe", *RING): {("all_to_all", SCORES): 1, ("psum", TABLE): 1},
    ("aoe", *FSDP): {("reduce_scatter", TABLE): 2},
}
NORMS = {("psum", 160): 3}  # gradients of norm scales: attention, experts, final
ADDED = dict.fromkeys(MERGED, NORMS) | {
    ("aoe", *FSDP): NORMS | {("psum", TABLE): 1}
}  # all-reduced, then sliced
HLO_NAMES = {"psum": "all-reduce", "all_gather": "all-gather"}
HLO_NAMES |= {"reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all"}


@pytest.mark.slow
@pytest.mark.parametrize("case", MERGED, ids=str)
def test_what_moves_on_a_tpu(case, first_round_only):
    """The compiled program without further rounds has no other collectives, and the compiler merges
    those that `plan` counts as merged. Loop bodies count once, and elements of tuples separately.
    """
    kind, mesh, transport = case
    _, devices = topology_devices("v5e:2x4")
    program, _ = traced(configuration(kind, mesh, transport), devices)
    found, sizes = {}, Counter()
    for instructions in hlo.parse(program.lower().compile().as_text())[0].values():
        for i in filter(lambda i: i.collective, instructions.values()):
            assert not i.opcode.endswith("-start"), i  # its result would include the operand
            # An asynchronous collective is listed once for each of its stages.
            found[i.attribute('chain_id="([0-9]+)"') or i.name] = i
    for i in found.values():
        for array in i.arrays:
            parts = len(devices) if i.collective == "reduce-scatter" else 1
            sizes[i.collective, parts * math.prod(array.dims)] += 1
    want = Counter(IN_A_LAYER[case]) + Counter(IN_A_STEP[mesh, transport]) + Counter(ADDED[case])
    want.subtract(MERGED[case])
    assert {moved: n for moved, n in sizes.items() if moved[1] > 16} == {
        (HLO_NAMES[name], size): n for (name, size), n in want.items() if n
    }


@pytest.mark.slow
def test_a_step_sends_rows_to_the_devices_of_their_experts(first_round_only):
    """On v5p five exchanges of a layer send only the rows of slots, and no buffer is filled."""
    _, devices = topology_devices("v5p:2x2x2")
    program, _ = traced(configuration("aoe", *ALL_TO_ALL), devices)
    operations = costs.Program(hlo.compile_and_read(program.lower())[1]).operations
    found = Counter(o.sent_bytes for o in operations if o.collective == "ragged-all-to-all")
    assert set(found) == {ROWS * 256 * 2}  # bfloat16; 160 columns are padded to 256
    assert sum(o.times for o in operations if o.collective == "ragged-all-to-all") == 5 * 3
    at_ends = [o for o in operations if costs.scope(o) in ("dispatch", "combine")]
    assert not [o for o in at_ends if o.opcode == "broadcast" and o.hbm_bytes > min(found) / 2]


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
    assert found == {
        ("all_gather", ("data",)): [5, 5 * size],
        ("reduce_scatter", ("data",)): [5, 5 * size],
    }


def planned(tmp_path, *arguments):
    """Plans for four chips; returns the exit status and the report."""
    file = tmp_path / "report.json"
    status = call("aoe_jax.plan", "--topology=v5e:2x2", f"--json={file}", *arguments)
    return status, read_json(file)


@pytest.mark.slow
def test_libtpu_is_silent():
    code = "from aoe_jax.planning.hardware import topology_devices; topology_devices('v5e:2x2')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_plan_for_four_chips(tmp_path, capsys):
    file = tmp_path / "config.json"
    write_json(file, configuration(mesh=(-1, 2, 1, 1)).to_dict())
    status, report = planned(tmp_path, f"--config={file}")
    assert status == 0 and report["fits"]
    assert report["mesh"] == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1, "transport": "ring"}
    stdout, memory = capsys.readouterr().out, report["memory_bytes"]
    assert "all_gather" in stdout and stdout.endswith("\nfits\n")
    assert memory["state"] + memory["temp"] <= memory["total"] * 1.01 < report["hbm_bytes"]
    # Compiled FLOPs are more than useful FLOPs, because the backward pass recomputes layers.
    assert 1.1 < report["flops"]["compiled"] / report["flops"]["useful"] < 1.6
    assert report["hbm_traffic_bytes"] > 2 * memory["state"]  # it is read and written
    scopes, likely = report["seconds_by_scope"], report["likely_step_seconds"]
    assert {"attention", "experts", "loss", "network", "update"} <= scopes.keys()
    assert sum(scopes.values()) == pytest.approx(likely) and likely > report["step_seconds"]
    assert report["likely_mfu"] == pytest.approx(
        report["mfu_bound"] * report["step_seconds"] / likely
    )
    compiled = report["compiled_collectives"]
    assert {entry["kind"] for entry in compiled} == {"all-gather", "all-reduce", "reduce-scatter"}
    gathers = [entry for entry in compiled if entry["kind"] == "all-gather"]
    (traced,) = (entry for entry in report["collectives"] if entry["kind"] == "all_gather")
    assert sum(entry["count"] for entry in gathers) == traced["count"]
    # Each of two devices receives half of the result from the other device.
    assert sum(entry["bytes"] for entry in gathers) >= 2 * traced["bytes"]


def test_the_arithmetic_of_a_plan(monkeypatch):
    """The step is traced but not compiled, for a v5e."""
    monkeypatch.setattr(step_plan, "_compile", lambda traced: (1e9, None, None))
    config = fill_mesh(configuration(mesh=(-1, 2, 1, 1)), 8)
    chip = CHIPS["v5e"]
    report = plan(config, "v5e", jax.devices())
    assert not report["fits"] and report["devices"] == 8
    assert report["mesh"] == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1, "transport": "ring"}
    memory, useful = report["memory_bytes"], report["flops"]["useful"]
    # float32 parameters and two moments; two devices share every array except norm scales.
    assert memory["state"] == pytest.approx(12 * report["parameters"] / 2, rel=0.01)
    assert useful == 32 * 64 * training_flops_per_token(config) / 8
    assert report["seconds"] == {
        "arithmetic": useful / chip.flops,
        "network": sum(report["collective_bytes"].values()) / chip.link_bandwidth,
        "HBM": 2 * memory["state"] / chip.hbm_bandwidth,
    }
    assert report["step_seconds"] == report["seconds"][report["bound_by"]]
    assert report["step_seconds"] == max(report["seconds"].values())
    assert report["mfu_bound"] == useful / chip.flops / report["step_seconds"] <= 1
    assert report["likely_step_seconds"] is None
    assert "not counted" in table(report) and "all_gather" in table(report)
    # Two slices of four: three of four devices along `data` send, one of them to the other slice.
    monkeypatch.setattr(step_plan, "count_parts", lambda devices: 2)
    of_two, across = plan(config, "v5e", jax.devices()), 0
    for entry in of_two["collectives"]:
        if "data" in entry["axes"]:
            across += entry["bytes"] / (7 if "fsdp" in entry["axes"] else 3)
    within = sum(of_two["collective_bytes"].values()) - across
    seconds = within / chip.link_bandwidth + across / chip.slice_bandwidth
    assert of_two["seconds"]["network"] == pytest.approx(seconds) and across > 0


def test_layouts_are_those_that_the_configuration_allows():
    """16 experts, 8 heads, d_low 48, which 32 devices cannot split; `data` spans two slices."""
    one = [c.mesh.shape for c in layouts.layouts(configuration(), 32)]
    assert one == [
        *((2, 16, 1, 1), (1, 16, 2, 1), (1, 8, 4, 1), (1, 4, 8, 1), (1, 2, 16, 1)),
        *((1, 16, 1, 2), (1, 8, 1, 4)),
    ]
    two = [c.mesh.shape for c in layouts.layouts(configuration(), 32, n_parts=2)]
    assert two[0] == (2, 16, 1, 1) and all(data % 2 == 0 for data, *_ in two)


def test_layouts_that_do_not_fit_are_last(monkeypatch):
    def plan(config, generation, devices):
        if config.mesh.tensor > 1:
            raise UserError("config.mesh: does not fit these devices")
        expert, times = config.mesh.expert, ("seconds_at_peaks", "seconds_by_cycles")
        report = dict.fromkeys(times, 0.0) | {"mesh": vars(config.mesh), "fits": expert == 2}
        report |= {"likely_step_seconds": None if expert == 8 else 1 / expert}
        return report | {"memory_bytes": {"total": 1e9}, "seconds_by_scope": {}}

    monkeypatch.setattr(layouts, "plan", plan)
    monkeypatch.setattr(layouts, "count_parts", lambda devices: 1)
    reports = layouts.plan_layouts(configuration(), "", range(32))
    lines = [layouts.line(report) for report in reports]
    assert "expert  2" in lines[0]
    assert [line.count("does not fit") for line in lines] == [0, 1, 1, 1, 1]
    assert "time unknown" in lines[-1] and "expert  8" in lines[-1] and "likely 0.062" in lines[1]


@pytest.mark.slow
def test_layouts_are_planned_and_the_fastest_is_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layouts, "_EXPERT", ())
    monkeypatch.setattr(layouts, "_TENSOR", (2,))
    model = {"n_layers": 1, "unroll": 1, "dtype": "bfloat16"}
    given = [f"--config.model.{name}={value}" for name, value in model.items()]
    status, report = planned(tmp_path, "--config=configs/tiny.py:dense", *given, "--layouts")
    times = [found["likely_step_seconds"] for found in report["layouts"]]
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and len(lines) == len(times) > 1 and times == sorted(times)
    for line, found in zip(lines, report["layouts"], strict=True):
        assert f"fsdp {found['mesh']['fsdp']:3}, expert {found['mesh']['expert']:2}" in line
        assert f"likely {found['likely_step_seconds']:.3f} s" in line


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_status_3(tmp_path, capsys):
    fields = {"model.n_layers": 98, "model.d_model": 1024, "experts.d_ffn": 3072}
    fields |= {"model.dtype": "bfloat16", "model.unroll": 1, "mesh.fsdp": 1}
    fields |= {"train.batch_size": 4, "data.seq_len": 128}
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    status, report = planned(tmp_path, "--config=configs/tiny.py:dense", *settings)
    assert status == 3 and not report["fits"]
    assert report["memory_bytes"]["total"] > report["hbm_bytes"]
    assert capsys.readouterr().out.endswith("\nDOES NOT FIT\n")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(-1, 8, 1, 1), (-1, 4, 2, 1), (-1, 1, 1, 4), (-1, 2, 2, 4)])
def test_the_hosts_of_a_slice_read_whole_batches(mesh):
    """This is true for every mesh, although the rows of a host need not be adjacent."""
    _, devices = topology_devices("v5e:4x4")
    config = fill_mesh(dataclasses.replace(configuration(), mesh=MeshConfig(*mesh)), len(devices))
    sharding = batch_sharding(make_mesh(config, devices))
    rows = [rows_of_process(sharding, 32, process) for process in range(4)]
    assert set().union(*rows) == set(range(32))
    assert all(len(mine) == len(set(mine)) for mine in rows)
    per_host = 32 // (len(devices) // config.mesh.tensor)
    assert all(len(mine) % per_host == 0 for mine in rows)
