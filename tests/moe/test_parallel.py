"""Layers over meshes of eight devices against the same layer on one: values, gradients, losses,
statistics.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.methods import LAYERS, find_method
from aoe_jax.methods.capacity import Capacity
from aoe_jax.methods.dynmoe import DynMoE
from aoe_jax.methods.erc import ERC
from aoe_jax.methods.expert_choice import ExpertChoice
from aoe_jax.methods.routing_free import RoutingFree
from aoe_jax.methods.sigmoid_top_k import SigmoidTopK
from aoe_jax.methods.smear import Smear
from aoe_jax.methods.thor import Thor
from aoe_jax.methods.top_p import TopP
from aoe_jax.methods.uoe import UoE
from aoe_jax.moe import collectives as parallel
from aoe_jax.moe import grouped_matmul, transports
from aoe_jax.moe import layer as moe_layer
from aoe_jax.moe.grouped_matmul import BACKENDS
from aoe_jax.moe.layer import ExpertsLayer, make_transport
from aoe_jax.moe.load_balance import balance_loss
from aoe_jax.moe.routing import TopK, by_token
from aoe_jax.moe.transports import AllToAll
from tests.arrays import assert_close, mesh_of, normal, operations
from tests.moe.contexts import parameters_of, routing_of_slots

B, S, D = 16, 8, 8
KEY = {"experts": jax.random.key(3)}  # for methods that draw at random in training
THREE = (1, 2, 2, 2)  # all axes except data
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), THREE, (2, 1, 1, 4)]
KINDS = {
    "aoe": {"kind": "aoe"},
    "router": {"kind": "router", "z_weight": 0.01},
    "over all": {"kind": "aoe", "routing": TopK(norm_topk_prob=False)},
    "as published": {"kind": "aoe", "score_gradient": "dense"},
    "whole": {"kind": "aoe", "score_neurons": 4},
    "top-p": {"kind": "aoe", "routing": TopP()},
    "expert choice": {"kind": "aoe", "routing": ExpertChoice()},
    "router, top-p": {"kind": "router", "routing": TopP()},
    "router, expert choice": {"kind": "router", "routing": ExpertChoice()},
    "factorised": {"kind": "router", "factorised_gate": True},
    "large router": {"kind": "router", "large_router": True},
    "capacity": {"kind": "capacity", "routing": Capacity(1.25)},  # some choices find no place
    "dense": {"kind": "dense"},
    "sigmoid": {"kind": "router", "routing": SigmoidTopK(True, 2.5, 4, 2)},
    "dynmoe": {"kind": "aoe", "routing": DynMoE()},
    "routing-free": {"kind": "aoe", "routing": RoutingFree()},
    "erc": {"kind": "router", "routing": ERC(alpha=0.5), "aux_batch": "sequence"},
    "uoe": {"kind": "uoe", "routing": UoE(routing_neurons=4)},
    "smear": {"kind": "smear", "routing": Smear(segment=4, expert_dropout=0.3)},
    "smear, aoe": {"kind": "smear", "routing": Smear(segment=4), "factorised_gate": True},
    "thor, aoe": {"kind": "thor", "routing": Thor(), "factorised_gate": True},
}
TRAINED = DynMoE | RoutingFree | ERC | Smear | Thor  # these differ in training


def make(settings, transport="ring", recompute=False, dtype=jnp.float64):
    settings = {"n_experts": 8, "top_k": 2, "d_ffn": 16, "d_low": 8} | settings
    names = ("aux_tokens", "aux_batch", "z_weight")
    balance = {name: settings.pop(name) for name in names if name in settings}
    default = find_method(settings["kind"])() if settings["kind"] in LAYERS else TopK()
    routing = settings.pop("routing", default)
    experts = ExpertsConfig(**settings)
    if experts.low_rank:
        experts = dataclasses.replace(experts, d_wide=16)
    layer = ExpertsLayer(
        experts=experts,
        routing=routing,
        balance=BalanceConfig(**balance),
        dtype=dtype,
        remat="experts" if recompute else "none",
        transport=transport,
        training=isinstance(routing, TRAINED),
    )
    x = normal(0, (B, S, D))
    params = parameters_of(layer, x)
    weights = jnp.ones((B, S)).at[3, 5:].set(0)  # padding counts in no statistic
    return layer, params, x, weights


def evaluate(layer, params, x, weights, routing_state=None):
    """Output, statistics, and the gradients of a projection of them."""
    cotangent = normal(2, x.shape, x.dtype)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x, weights, routing_state, rngs=KEY)
        balance = balance_loss(stats.load, stats.mean_probability) + 0.3 * stats.confidence_entropy
        extras = stats.records, stats.shares, stats.per_token, stats.sequence_loss, stats.z_loss
        balance += sum((a * a).sum() for a in jax.tree.leaves(extras))
        return (y * cotangent).sum() + balance, (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


@cache
def alone(kind):
    """What one device computes."""
    return evaluate(*make(KINDS[kind]))


def on_mesh(shape, *args):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        return evaluate(*args)


def ways(shape):
    return ["ring", "all_to_all"] if shape[2] > 1 else ["ring"]


FAST = [(THREE, "ring", "aoe"), (THREE, "all_to_all", "aoe"), ((2, 1, 1, 4), "ring", "capacity")]
FAST += [(THREE, "ring", "uoe"), (THREE, "all_to_all", "dynmoe"), ((1, 1, 2, 4), "ring", "smear")]
WAYS = ("ring", "all_to_all")
SLOW = [(shape, way, "aoe") for shape in MESHES for way in ways(shape)]
SLOW += [(THREE, "ring", "whole")]
SLOW += [((2, 1, 4, 1), "all_to_all", "aoe")]
SLOW += [(THREE, "all_to_all", kind) for kind in ("router", "uoe")]
OTHERS = [k for k in KINDS if k not in ("aoe", "router", "dense", "whole", "uoe", "erc", "smear")]
OTHERS.remove("dynmoe")  # in the fast tier
OTHERS = [kind for kind in OTHERS if ", aoe" not in kind and "router, " not in kind]
SLOW += [(THREE, WAYS[i % 2], kind) for i, kind in enumerate(OTHERS)]
SLOW += [((2, 2, 1, 2), "ring", "dense"), ((2, 2, 2, 1), "ring", "erc")]
SLOW += [((2, 4, 1, 1), "ring", kind) for kind in ("router", "as published")]
SLOW += [((1, 1, 2, 4), "ring", kind) for kind in ("smear, aoe", "thor, aoe")]
SLOW += [((2, 1, 1, 4), "ring", "uoe")]
CASES = FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST]


@pytest.mark.parametrize(("shape", "transport", "kind"), CASES)
def test_a_mesh_computes_what_one_device_does(x64, ragged, shape, transport, kind):
    layer, params, x, weights = make(KINDS[kind], transport)
    assert_close(on_mesh(shape, layer, params, x, weights), alone(kind), 1e-10)


LAID_OUT = [
    (THREE, "all_to_all", "aoe", True),
    (THREE, "ring", "router", False),
    ((1, 1, 2, 4), "ring", "smear, aoe", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "transport", "kind", "recompute"), LAID_OUT)
def test_a_mesh_with_the_backend_of_cpus(x64, shape, transport, kind, recompute):
    """The backend `blocked` has a row layout of its own."""
    layer, params, x, weights = make(KINDS[kind], transport, recompute)
    assert_close(on_mesh(shape, layer, params, x, weights), alone(kind), 1e-10)


@pytest.mark.parametrize(
    ("kind", "transport"), [("aoe", "all_to_all"), ("uoe", "ring"), ("thor, aoe", "ring")]
)
def test_a_backend_by_configuration(ragged, monkeypatch, kind, transport):
    """Every product uses it; the backend of the platform is not called."""
    settings = KINDS[kind] | {"grouped_matmul": "blocked"}
    if kind == "thor, aoe":
        settings["routing"] = Thor(inference="token")
    layer, params, x, weights = make(settings, transport, dtype=jnp.float32)
    monkeypatch.delitem(BACKENDS, "ragged")
    with jax.set_mesh(mesh_of(*THREE)):
        jax.eval_shape(layer.clone(training=False).apply, {"params": params}, x, weights)


@pytest.mark.parametrize("kind", ["capacity", "smear"])
def test_flat_tokens_of_a_mesh_are_refused_where_sequences_count(x64, kind):
    layer, params, x, _ = make(KINDS[kind], dtype=jnp.float32)
    with jax.set_mesh(mesh_of(8, 1, 1, 1)), pytest.raises(ValueError, match="needs sequences"):
        jax.eval_shape(layer.apply, {"params": params}, x.reshape(-1, D), rngs=KEY)


def test_flat_tokens_of_a_mesh_where_experts_choose(x64, ragged):
    layer, params, x, weights = make(KINDS["router, expert choice"])
    flat = {"params": params}, x.reshape(-1, D), weights.reshape(-1)
    want = jax.jit(layer.apply)(*flat)[0]
    with jax.set_mesh(mesh_of(*THREE)):
        assert_allclose(jax.jit(layer.apply)(*flat)[0], want, atol=1e-10)


CROWDS = [((1, 1, 8, 1), "ring"), ((1, 1, 8, 1), "all_to_all"), ((2, 1, 2, 2), "ring")]
CROWDED = [("aoe", *way) for way in CROWDS[1:]] + [("router", *way) for way in CROWDS[:2]]
CROWDED += [("whole", *CROWDS[0])]


@pytest.mark.parametrize(
    ("kind", "shape", "transport"),
    CROWDED[:1] + [pytest.param(*case, marks=pytest.mark.slow) for case in CROWDED[1:]],
)
@pytest.mark.usefixtures("x64", "ragged")
def test_all_tokens_choose_the_experts_of_one_device(kind, shape, transport):
    """The rows of this device take several rounds, and no row is dropped."""
    layer, params, x, weights = make(KINDS[kind] | {"top_k": 1}, transport)
    bias = {"selection_bias": jnp.zeros(8).at[0].set(100.0)}
    want = evaluate(layer, params, x, weights, bias)
    assert float(want[1][1].load[0]) == 1
    devices, rows = parallel.Devices(shape, transport), B * S
    experts = ExpertsConfig(n_experts=8, top_k=1)
    buffer = make_transport(
        devices, routing_of_slots(1), experts, TopK(), jnp.zeros((B * S // 8, D))
    )
    assert rows > 1.9 * buffer.size
    assert_close(on_mesh(shape, layer, params, x, weights, bias), want, 1e-10)


@pytest.mark.slow
def test_kernels_of_swiglu_in_further_rounds(monkeypatch):
    """Megablox in the interpreter recomputes `x W_up`; the test of undefined rows keeps it."""
    settings = KINDS["whole"] | {"top_k": 1}
    layer, params, x, weights = make(settings, "all_to_all", True, jnp.float32)
    bias = {"selection_bias": jnp.zeros(8).at[0].set(100.0)}
    want = evaluate(layer, params, x, weights, bias)
    monkeypatch.setattr(grouped_matmul, "_default_backend", lambda device: "megablox")
    assert_close(on_mesh((1, 1, 8, 1), layer, params, x, weights, bias), want, 1e-4)


@pytest.mark.parametrize("dimension", [0, 1])
def test_gathers_and_sums_in_two_stages_are_those_in_one(monkeypatch, dimension):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    g = normal(0, (8, 16, 24))  # of each device, [16, 24]
    pieces = PartitionSpec(*[None] * dimension, "fsdp")

    def summed_and_gathered(groups):
        monkeypatch.setattr(parallel, "_stages", lambda *_: groups)

        def function(g):
            total = parallel.sum_gradients(g[0], "fsdp", dimension)
            return total, parallel.gather_in_stages(total, "fsdp", dimension)

        specs = {"in_specs": PartitionSpec("fsdp"), "out_specs": (pieces, PartitionSpec())}
        return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))(g)

    for groups in ([None], parallel.two_stages(8)):
        for total in summed_and_gathered(groups):
            assert_allclose(total, g.sum(axis=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_gradients_of_experts_summed_in_bfloat16(x64, ragged, kind):
    """Their error is that of rounding eight terms and sums; other gradients have none."""
    layer, params, x, weights = make(KINDS[kind], dtype=jnp.float32)
    experts = dataclasses.replace(layer.experts, gradient_sums="bfloat16")
    rounded = layer.clone(experts=experts)
    ((want, _), _), ((got, _), _) = (
        on_mesh((1, 8, 1, 1), one, params, x, weights) for one in (layer, rounded)
    )
    for name, exact in want.items():
        error = float(jnp.linalg.norm(got[name] - exact) / jnp.linalg.norm(exact))
        per_expert = moe_layer.parameters_of(layer.experts, layer.routing)[name].per_expert
        low, high = (1e-4, 4e-3) if per_expert else (0, 1e-6)
        assert low <= error <= high, name


def test_rows_arrive_in_expert_order():
    """`ragged_all_to_all` in numpy, as JAX documents it, with the segments of every device."""
    n_devices, n_own, n_slots = 4, 3, 40
    expert = np.random.default_rng(0).integers(0, n_devices * n_own + 1, (n_devices, n_slots))
    expert[:, :15] = 1  # so the first device needs a second round
    slots, settings = PartitionSpec("expert"), (n_devices * n_own, 1, n_slots)

    @jax.jit
    @partial(jax.shard_map, in_specs=slots, out_specs=slots, check_vma=False)
    def two_rounds(expert):
        transport = AllToAll(parallel.Devices((1, 1, n_devices, 1)), *settings)
        schedule = transport.schedule(by_token(expert[:, None], jnp.ones((n_slots, 1))))
        rounds = [transport.round(schedule, number) for number in range(2)]
        rows = [transport.row_values(expert + 1, round) for round in rounds]
        own = [jnp.where(r.rows.slot < n_slots, expert[r.rows.slot] + 1, 0) for r in rounds]
        found = [(*round[1:], *more) for round, *more in zip(rounds, own, rows, strict=True)]
        return schedule.n_rounds[None], jax.tree.map(lambda *a: jnp.stack(a)[None], *found)

    with jax.set_mesh(jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))):
        n_rounds, found = jax.tree.map(np.asarray, two_rounds(expert.reshape(-1)))
    groups, sent, received, own, rows = found
    assert_array_equal(n_rounds, [2] * n_devices)
    out = np.zeros_like(rows)
    for sender, number, receiver, i in np.ndindex(sent.size.shape):
        run = np.arange(sent.size[sender, number, receiver, i])
        assert len(run) == received.size[receiver, number, sender, i]
        landing = sent.landing[sender, number, receiver, i]
        assert landing == received.start[receiver, number, sender, i]
        values = own[sender, number, sent.start[sender, number, receiver, i] + run]
        out[receiver, number, landing + run] = values
    assert_array_equal(rows, out)
    for device in range(n_devices):
        used = [
            r[: sizes.sum()] for r, sizes in zip(rows[device], groups.sizes[device], strict=True)
        ]
        assert all((np.diff(one) >= 0).all() for one in used)
        of_device = expert[(expert // n_own == device) & (expert < n_devices * n_own)]
        assert_array_equal(np.sort(np.concatenate(used)), np.sort(of_device) + 1)


UNDEFINED = [("all_to_all", "aoe", "blocked", 1), ("all_to_all", "whole", "megablox", 1)]
UNDEFINED += [("all_to_all", "router, top-p", "ragged", 2), ("ring", "whole", "megablox", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "kind", "backend", "k"), UNDEFINED)
def test_undefined_rows_change_nothing(monkeypatch, ragged, transport, kind, backend, k):
    """TPUs do not fill the buffers that rows, results and gradients arrive in."""
    layer, params, x, weights = make(KINDS[kind] | {"top_k": k}, transport, dtype=jnp.float32)
    # With one expert per token, all choose the first one, which takes several rounds.
    bias = {"selection_bias": jnp.zeros(8).at[0].set(100.0)} if k == 1 else None
    want = on_mesh((1, 1, 8, 1), layer, params, x, weights, bias)

    def undefined(rows, index):
        fill = jnp.nan if rows.ndim > 1 else 0
        return rows.at[index].get(mode="fill", fill_value=fill)

    monkeypatch.setattr(grouped_matmul, "_default_backend", lambda device: backend)
    monkeypatch.setattr(parallel, "take", undefined)
    monkeypatch.setattr(transports, "LANES", 4)  # rows travel in two lanes
    assert_close(on_mesh((1, 1, 8, 1), layer, params, x, weights, bias), want, 1e-4)


def assert_near(got, want, share):
    """Compares arrays with a tolerance relative to the largest entry of each."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_allclose(np.asarray(a, float), b, atol=share * float(jnp.abs(b).max()))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "kind", ["aoe", "whole", "router", "capacity", "uoe", "smear, aoe", "thor, aoe"]
)
def test_bfloat16(ragged, kind):
    """Outputs and gradients are near those of float32. The rounded scores of these few tokens do
    not tie.
    """
    layer, params, x, weights = make(KINDS[kind], dtype=jnp.bfloat16)
    params, x = jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), (params, x[-2:]))
    got = evaluate(layer, params, x, weights[-2:])
    assert got[1][0].dtype == jnp.bfloat16
    assert_near(got, evaluate(layer.clone(dtype=jnp.float32), params, x, weights[-2:]), 0.05)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shape", "transport"),
    [
        (THREE, "ring"),
        pytest.param((1, 2, 4, 1), "all_to_all", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_on_a_mesh(ragged, shape, transport):
    """Gradients of weights are summed over devices in float32."""
    arguments = make(KINDS["router"], transport, dtype=jnp.bfloat16)
    assert_near(on_mesh(shape, *arguments)[0], evaluate(*arguments)[0], 0.03)
    with jax.set_mesh(mesh_of(*shape)):
        found = operations(partial(evaluate, arguments[0]), *arguments[1:])
    sums = [eqn for eqn in found if eqn.primitive.name == "reduce_scatter"]
    over_fsdp = [eqn.invars[0].aval for eqn in sums if "fsdp" in eqn.params["axis_name"]]
    assert over_fsdp and all(a.dtype == jnp.float32 for a in over_fsdp)


def kept(shape, kind, transport="ring", recompute=False):
    """Shapes that a layer keeps for the backward pass, of all devices if theirs differ."""
    settings = KINDS[kind] | {"d_ffn": 24}  # no array of tokens has the shape of a weight
    if kind == "capacity":
        settings |= {"routing": Capacity(1.0)}
    layer, params, x, _ = make(settings, transport, recompute, dtype=jnp.float32)
    layer = dataclasses.replace(layer, balance=BalanceConfig(aux_weight=0.01))
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    mesh = mesh_of(*shape)

    def outputs(params, x):
        y, stats = layer.apply({"params": params}, x)
        return y, stats.mean_probability

    with jax.set_mesh(mesh):
        pull_back = jax.eval_shape(lambda p, x: jax.vjp(outputs, p, x)[1], params, x)
    return [a.shape for a in jax.tree.leaves(pull_back)], params


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("shape", "transport", "kind"),
    [
        ((1, 8, 1, 1), "ring", "router"),
        ((1, 8, 1, 1), "ring", "aoe"),
        ((1, 8, 1, 1), "ring", "as published"),
        ((1, 8, 1, 1), "ring", "factorised"),
        ((1, 8, 1, 1), "ring", "capacity"),
        ((1, 2, 4, 1), "all_to_all", "capacity"),
        ((1, 2, 4, 1), "ring", "aoe"),
        ((1, 2, 4, 1), "all_to_all", "aoe"),
        ((1, 1, 8, 1), "all_to_all", "aoe"),
        ((1, 8, 1, 1), "ring", "dense"),
    ],
)
def test_whole_weights_are_not_kept(x64, shape, transport, kind, recompute):
    """Neither weights gathered over fsdp nor the w_gate_down of all experts are kept."""
    shapes, params = kept(shape, kind, transport, recompute)
    whole = set()
    for name, w in params.items():
        everywhere = name == "w_gate_down" and transport == "all_to_all"
        if everywhere or (shape[1] > 1 and "router" not in name):
            experts = 1 if w.ndim == 2 else shape[2]  # w.shape[0] are experts, but in a dense layer
            whole.add((8 * w.shape[0] // (1 if everywhere else experts), *w.shape[1:]))
    assert not whole & set(shapes)
    assert any(len(one) == 2 and one[0] >= B * S for one in shapes)  # rows are kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("aoe", False), ("aoe", True), ("router", False), ("router", True), ("dense", False)],
)
def test_fsdp_keeps_no_more_than_data(x64, kind, recompute):
    """Gathering weights again in the backward pass needs no more memory for activations."""
    wide = []
    for shape in (1, 8, 1, 1), (8, 1, 1, 1):
        shapes, _ = kept(shape, kind, recompute=recompute)
        wide.append(sum(len(shape) == 2 and shape[0] >= B * S for shape in shapes))
    assert wide[0] <= wide[1]


@pytest.mark.smoke
def test_what_a_router_does_not_need_costs_nothing(x64, ragged):
    """The compiled program of top-k does not take positions, captured values and random keys."""
    layer, params, x, weights = make(KINDS["aoe"], dtype=jnp.float32)
    layer = layer.clone(training=True)

    def memory(**more):
        def outputs(params, x, weights, key, more):
            rngs = None if key is None else {"experts": key}
            return layer.apply({"params": params}, x, weights, layer_index=3, rngs=rngs, **more)

        key = more.pop("key", None)
        compiled = jax.jit(outputs).lower(params, x, weights, key, more).compile()
        return compiled.memory_analysis().argument_size_in_bytes

    more = {"captured": jnp.ones((B, S, 2)), "positions": jnp.zeros((B, S), jnp.int32)}
    with jax.set_mesh(mesh_of(*THREE)):
        assert memory(**more, key=jax.random.key(0)) == memory()


@pytest.mark.smoke
@pytest.mark.parametrize("recompute", [False, True])
def test_devices_agree_on_the_number_of_rounds_once(x64, ragged, recompute):
    """Further rounds of norms and of outputs share one schedule."""
    layer, params, x, weights = make(KINDS["aoe"], "all_to_all", recompute)
    mesh = mesh_of(1, 2, 4, 1)

    def gradient(params, x):
        return jax.grad(lambda params: layer.apply({"params": params}, x, weights)[0].sum())(params)

    with jax.set_mesh(mesh):
        found = operations(gradient, params, x)
    assert [eqn.primitive.name for eqn in found].count("pmax") == 1
