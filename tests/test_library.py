"""AoE and MoE as a library: values, gradients, transformations, meshes of other names, refusals."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import aoe_jax
from aoe_jax import AoE, AoELayer, DenseLayer, ExpertsLayer, MoE, RouterLayer
from aoe_jax import nnx as aoe_nnx
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.errors import UserError
from aoe_jax.methods import find_method
from aoe_jax.methods.dense import Dense
from aoe_jax.methods.erc import ERC
from aoe_jax.methods.sparsemixer import SparseMixer
from aoe_jax.methods.top_p import TopP
from aoe_jax.moe import reference
from aoe_jax.moe.routing import TopK
from tests.arrays import assert_close, normal

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("ragged")]

D, SIZES = 24, {"n_experts": 4, "top_k": 2, "d_ffn": 16}
X = normal(0, (8, 4, D))
LAYERS = {
    "aoe": AoE(**SIZES, d_wide=16),
    "whole gates": AoE(**SIZES, score_neurons=4),
    "one neuron": AoE(**SIZES, score_neurons=1, score="max"),
    "moe": MoE(**SIZES),
}


@dataclass(frozen=True)
class WithLoss(TopK):
    """Top-k routing with an additional loss, which is used only in training."""

    def losses(self, stats, state, weights):
        return {"size": (0.5, jnp.square(weights["w_router"]).sum())}


@dataclass(frozen=True)
class WithState(TopK):
    def state(self, experts, balance, d):
        return {"selection_bias": jnp.zeros(experts.n_experts)}


def drawn(layer, x=X):
    return jax.jit(layer.init)(jax.random.key(1), x)


def evaluate(layer, variables, x=X):
    """Computes gradients, and output, loss and metrics."""

    def loss(variables, x):
        y, aux = layer.apply(variables, x)
        return (y**2).mean() + aux.loss, (y, aux.loss, aux.metrics)

    return nn.unbox(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x))


def reference_layer(kind, w, x):
    x = x.reshape(-1, D)
    if kind == "aoe":
        names = ("w_gate_down", "w_gate_up", "w_up", "w_down")
        return reference.aoe_layer(x, *(w[name] for name in names), top_k=2)
    if kind == "moe":
        names = ("w_router", "w_gate", "w_up", "w_down")
        weights = (w[name] for name in names)
        return reference.router_layer(x, *weights, top_k=2, norm_topk_prob=True)
    if kind == "one neuron":
        scores = jnp.einsum("td,nd->tn", x, w["w_gate"][..., 0])
    else:
        scores = reference.aoe_scores(x, w["w_gate"][..., :4])
    weights = reference.top_k_weights(scores, 2)
    return reference.router_experts(x, weights, w["w_gate"], w["w_up"], w["w_down"])


@pytest.mark.parametrize("kind", LAYERS)
def test_defaults_are_the_reference(kind, x64):
    layer, x = LAYERS[kind].clone(d_wide=None) if kind == "aoe" else LAYERS[kind], X.astype("f8")
    w = drawn(layer, x)["params"]
    if kind == "aoe":
        assert w["w_gate_down"].shape == (4, D, D // 3)

    def of_layer(w, x):
        y, _ = layer.apply({"params": w}, x)
        return (y**2).sum(), y.reshape(-1, D)

    def of_reference(w, x):
        y = reference_layer(kind, w, x)
        return (y**2).sum(), y

    # Without the auxiliary loss, layer and reference have the same gradients.
    got, want = (jax.jit(jax.grad(f, (0, 1), has_aux=True))(w, x) for f in (of_layer, of_reference))
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_auxiliary_loss(kind):
    """It is the paper's formula, has a gradient for the scoring weights, and is sown once."""
    layer = LAYERS[kind].clone(aux_weight=0.5, z_weight=0.25)
    variables = drawn(layer)
    assert set(variables) == {"params"}
    (_, aux), sown = layer.apply(variables, X, mutable=["losses"])
    (value,) = jax.tree.leaves(sown["losses"])
    stats, metrics = aux.stats, aux.metrics
    want = 4 * (stats.load * stats.mean_probability).sum()
    assert_allclose(metrics["aux_loss"], want, rtol=1e-6)
    assert_allclose(aux.loss, 0.5 * want + 0.25 * metrics["z_loss"], rtol=1e-6)
    assert value == aux.loss
    assert all(a.shape == () and np.isfinite(a) for a in metrics.values())
    grads = jax.jit(jax.grad(lambda v: layer.apply(v, X)[1].loss))(variables)["params"]
    scoring = {"aoe": "w_gate_down", "moe": "w_router"}.get(kind, "w_gate")
    moved = {name for name, g in grads.items() if jnp.abs(g).max() > 0}
    assert moved == {scoring}


def test_padding_does_not_count():
    layer, real = LAYERS["aoe"], jnp.arange(4) < 3
    variables = drawn(layer)
    padded = layer.apply(variables, X, jnp.broadcast_to(real, X.shape[:2]).astype(jnp.float32))[1]
    assert_close(padded.metrics, layer.apply(variables, X[:, :3])[1].metrics, 1e-5)


def test_bfloat16():
    layer = LAYERS["aoe"]
    variables = drawn(layer, X.astype(jnp.bfloat16))
    y, aux = layer.apply(variables, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and aux.loss.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert layer.clone(dtype=jnp.bfloat16).apply(variables, X)[0].dtype == jnp.bfloat16


class Residual(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x, _):
        y, aux = self.layer(x)
        return x + y, aux.loss


def stack_of(layer, **settings):
    axes = {"variable_axes": {"params": 0, "losses": 0}, "split_rngs": {"params": True}}
    return nn.scan(Residual, **axes, length=3, **settings)(layer)


@pytest.mark.slow
def test_scan_over_layers():
    stack = stack_of(LAYERS["aoe"].clone())
    variables = jax.jit(stack.init)(jax.random.key(1), X, None)

    def scanned(variables):
        (y, losses), sown = stack.apply(variables, X, None, mutable=["losses"])
        assert_array_equal(jax.tree.leaves(sown)[0].shape, losses.shape)
        return (y**2).mean() + losses.sum(), y

    def unrolled(variables):
        x, total = X, 0
        for number in range(3):
            of_layer = jax.tree.map(lambda a: a[number], variables["params"]["layer"])
            y, aux = LAYERS["aoe"].apply({"params": of_layer}, x)
            x, total = x + y, total + aux.loss
        return (x**2).mean() + total, x

    got, want = (jax.jit(jax.grad(f, has_aux=True))(variables) for f in (scanned, unrolled))
    assert_close(got, want, 2e-5)


def test_scan_over_split_layers():
    layer = LAYERS["aoe"].clone(fsdp="a", expert="b")
    stack = stack_of(layer, metadata_params={nn.PARTITION_NAME: None})
    with jax.set_mesh(mesh_of((2, 4))):
        variables = jax.eval_shape(stack.init, jax.random.key(1), X, None)
        spec = nn.get_partition_spec(variables)["params"]["layer"]["w_up"]
        assert spec == P(None, "b", "a", None)
        assert jax.eval_shape(stack.apply, variables, X, None)[1].shape == (3,)


ON_A_MESH = pytest.param(
    aoe_nnx.MoE, {}, {"expert": "a", "tensor": "b"}, marks=pytest.mark.slow, id="moe, on a mesh"
)


@pytest.mark.parametrize(
    ("layer", "more", "axes"),
    [
        pytest.param(aoe_nnx.AoE, {"round_to": 2}, {}, id="aoe"),
        pytest.param(aoe_nnx.MoE, {}, {}, id="moe"),
        ON_A_MESH,
    ],
)
def test_nnx(layer, more, axes):
    """Values and gradients are those of the Linen module, and variables have partition specs."""
    loss_of = lambda y, aux: (y**2).mean() + aux.loss  # noqa: E731
    with jax.set_mesh(mesh_of((4, 2))) if axes else contextlib.nullcontext():
        module = layer(D, rngs=nnx.Rngs(0), **SIZES, **more, **axes)
        spec = nnx.get_partition_spec(nnx.state(module))["w_up"].get_value()
        assert spec == (P("a", None, "b") if axes else P())
        gradient = nnx.jit(nnx.value_and_grad(lambda module: loss_of(*module(X))))
        got, grads = jax.device_get(gradient(module))
    params = jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    linen = layer.linen(**SIZES, **more)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, nn.unbox(linen.init(jax.random.key(0), X)["params"])
    )
    want = jax.value_and_grad(lambda params: loss_of(*linen.apply({"params": params}, X)))(params)
    assert_close((got, nnx.to_pure_dict(grads)), want, 2e-5)


def test_nnx_draws_random_numbers():
    router = find_method("gshard")()
    layer = aoe_nnx.MoE(D, rngs=nnx.Rngs(0), **SIZES, routing=router, aux_weight=0)
    rngs = nnx.Rngs(1)
    first, second = (layer(X, None, True, rngs=rngs)[0] for _ in range(2))
    assert (first != second).any()
    aoe_nnx.MoE(D, rngs=nnx.Rngs(0), **SIZES)(X, rngs=nnx.Rngs(dropout=1))  # draws nothing


def mesh_of(shape, types=AxisType.Auto):
    return jax.make_mesh(shape, ("a", "b", "c")[: len(shape)], axis_types=(types,) * len(shape))


AXES = [
    ("aoe", {"data": "a", "expert": ("c", "b")}),
    ("moe", {"fsdp": "a", "expert": "b", "tensor": "c"}),
    ("aoe", {}),
    ("aoe", {"fsdp": ("b", "a"), "tensor": "c"}),
    ("aoe", {"expert": ("b", "a"), "transport": "all_to_all"}),
]
AXES[2:] = [pytest.param(*case, marks=pytest.mark.slow) for case in AXES[2:]]


@pytest.mark.parametrize("kind,axes", AXES, ids=str)
def test_axes_of_other_names(kind, axes):
    """Values, gradients and metrics equal those of one device. Parameters have partition specs."""
    layer = LAYERS[kind]
    want = evaluate(layer, drawn(layer))
    layer, mesh = layer.clone(**axes), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        specs = nn.get_partition_spec(jax.eval_shape(layer.init, jax.random.key(1), X))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(1), X)
        assert_close(evaluate(layer, variables), want, 2e-5)
    splits = {name for spec in specs["params"].values() for name in jax.tree.leaves(tuple(spec))}
    named = [axes.get(axis, ()) for axis in ("fsdp", "expert", "tensor")]
    assert splits == {name for names in named for name in names}


@pytest.mark.slow
def test_explicit_axes():
    """Layers work on meshes with explicit axes, the default of `jax.make_mesh`."""
    layer = LAYERS["aoe"]
    want = evaluate(layer, drawn(layer))
    layer, mesh = layer.clone(fsdp="a", expert="b"), mesh_of((2, 2, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P(("a", "b"))))
        got = evaluate(layer, drawn(layer, x), x)
        assert_close(got, want, 2e-5)
        assert got[1][0].sharding.is_equivalent_to(x.sharding, 3)


def test_inside_shard_map():
    """Every device applies the layer to its own tokens; `data` makes the statistics global."""
    layer = LAYERS["aoe"]
    variables = drawn(layer)
    want, layer = evaluate(layer, variables), layer.clone(data="a")

    def step(variables, x):
        def loss(variables):
            y, aux = layer.apply(variables, x)
            return (y**2).mean() + aux.loss, (y, aux.loss, aux.metrics)

        grads, others = jax.grad(loss, has_aux=True)(variables)
        return jax.lax.pmean(grads, "a"), others

    def run(step):
        specs = {"in_specs": (P(), P("a")), "out_specs": (P(), (P("a"), P(), P()))}
        return jax.jit(jax.shard_map(step, check_vma=False, **specs))(variables, X)

    with jax.set_mesh(mesh_of((4, 2))):
        assert_close(run(step), (want[0][0], want[1]), 2e-5)
        layer = layer.clone(expert="b")
        with pytest.raises(ValueError, match=r"AoE: .*expert='b': leave it at None inside jax"):
            run(step)
        layer = layer.clone(expert=None)
        with pytest.raises(ValueError, match="AoE: .* needs check_vma=False"):
            jax.shard_map(layer.apply, in_specs=(P(), P("a")), out_specs=P("a"))(variables, X)


REFUSED = [
    ({"top_k": 5}, "top_k=5: must be greater than 0 and at most n_experts=4"),
    ({"d_low": 4, "score_neurons": 2}, "d_low=4: .* set None with score_neurons=2"),
    ({"top_k": 2.0}, r"top_k=2\.0: must be a whole number"),
    ({"aux_weight": "a"}, "aux_weight='a': must be a number"),
    ({"d_wide": 4, "score_neurons": 2}, "d_wide=4: .* set the width with d_ffn"),
    ({"score": "min"}, "score='min': choose one of norm, max"),
    ({"d_low": D}, f"d_low={D}: must be smaller than d_model={D}"),
    ({"dtype": "int32"}, "dtype='int32': must be a floating-point type of at least 16"),
    ({"dtype": jnp.float8_e4m3fn}, "dtype=.*float8.*: must be a floating-point type of"),
    ({"routing": "top_p"}, r"routing='top_p': take a router, such as TopP\(\) of aoe_jax.meth"),
    ({"routing": Dense()}, r"routing=Dense\(\): take a router"),
    ({"routing": ERC()}, "routing='erc': couples the columns of a plain router"),
    ({"routing": WithState()}, r"routing=WithState\(.*\): it has a state"),
    ({"expert": "ep"}, "mesh axis expert='ep': name axes of the mesh, .*'a', 'b'.*, or None"),
    ({"expert": "a", "data": "a"}, "mesh axis expert='a': 'a' is already the name of another axis"),
    ({"expert": "a", "n_experts": 6}, "expert='a': its 4 devices must divide n_experts"),
    ({"tensor": "b", "d_wide": 15}, "tensor='b': .* the width of experts, 15; set round_to"),
    ({"tensor": "b", "score_neurons": 9}, "score_neurons=9: must be at most d_ffn"),
    ({"fsdp": "a", "d_low": 6}, "fsdp='a': its 4 devices must divide d_low, 6"),
]
# (changes of a layer, shape of the tokens without their width, words of the message).
REFUSED_SHAPES = [
    ({"data": "a"}, (6, 4), "x has the shape .*first axis must be a multiple of the 4 devices"),
    ({"tensor": "b"}, (8, 3), "tensor='b': it must divide the second axis of x"),
    ({"data": "a"}, (8, 4, 2), r".* on several devices it must be \[B, S, d\] or \[T, d\]"),
]


@pytest.mark.parametrize(
    ("settings", "shape", "message"), [(s, (8, 4), m) for s, m in REFUSED] + REFUSED_SHAPES
)
def test_refused(settings, shape, message):
    with jax.set_mesh(mesh_of((4, 2))), pytest.raises(ValueError, match=f"^AoE: {message}"):
        jax.eval_shape(AoE(**SIZES | settings).init, jax.random.key(0), jnp.ones((*shape, D)))


def test_names_of_axes_need_a_mesh():
    with pytest.raises(ValueError, match=r"AoE: expert='a': there is no mesh; call the layer with"):
        jax.eval_shape(AoE(**SIZES, expert="a").init, jax.random.key(0), X)


def test_nnx_refuses_tokens_of_another_width():
    with pytest.raises(ValueError, match=rf"x has the shape .*: its last axis must be {D}"):
        aoe_nnx.MoE(D, rngs=nnx.Rngs(0), **SIZES)(jnp.ones((4, D + 1)))


def test_refused_tokens():
    small = jnp.ones((4, D), jnp.float8_e4m3fn)
    for x in (jnp.ones(D), jnp.ones((4, D), jnp.int32), jnp.ones((0, D)), small):
        with pytest.raises(ValueError, match=r"MoE: x is .* must be floats of 16 bits or more"):
            jax.eval_shape(LAYERS["moe"].init, jax.random.key(0), x)
    wanted = r"MoE: token_weights has the shape \(8,\): it must be that of the tokens, \(8, 4\)"
    with pytest.raises(ValueError, match=wanted):
        jax.eval_shape(LAYERS["moe"].init, jax.random.key(0), X, jnp.ones(8))


def test_layers_and_their_kinds():
    for kind in ("dense", "smear", "foo"):
        with pytest.raises(ValueError, match=f"kind='{kind}': give the layer of aoe_jax.methods"):
            jax.eval_shape(ExpertsLayer(ExpertsConfig(kind=kind)).init, jax.random.key(0), X)
    dense = ExpertsLayer(ExpertsConfig(kind="dense"), Dense())
    assert jax.eval_shape(dense.init, jax.random.key(0), X)
    for make, kind in ((AoELayer, "router"), (RouterLayer, "aoe"), (DenseLayer, "aoe")):
        with pytest.raises(ValueError, match=rf"ExpertsConfig\(kind='{kind}'\): .* needs kind="):
            make(ExpertsConfig(kind=kind))


def test_routers_in_training():
    """A method's own loss is part of `aux.loss`; methods that cannot be trained raise errors."""
    layer = MoE(**SIZES, routing=WithLoss(), aux_weight=0.0)
    variables = drawn(layer)
    assert layer.apply(variables, X)[1].loss == 0
    aux = layer.apply(variables, X, training=True)[1]
    want = jnp.square(variables["params"]["w_router"]).sum()
    assert_allclose([aux.metrics["size"], aux.loss], [want, want / 2], rtol=1e-6)
    layer = layer.clone(routing=SparseMixer())
    assert layer.apply(variables, X)[0].shape == X.shape
    with pytest.raises(ValueError, match="MoE: routing='sparsemixer': can be used but not trained"):
        layer.apply(variables, X, training=True)


@dataclass(frozen=True)
class Doubled(TopK):
    """Weights of the experts are twice the softmax."""

    def __call__(self, scores, weights, ctx):
        routing = super().__call__(scores, weights, ctx)
        return routing._replace(weight=2 * routing.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_router_that_inherits_from_top_k_decides_its_weights(kind):
    layer = LAYERS[kind]
    variables = drawn(layer)
    want = 2 * layer.apply(variables, X)[0]
    assert_close(layer.clone(routing=Doubled()).apply(variables, X)[0], want, 2e-5)


def test_score_gradients_that_would_be_wrong():
    experts = ExpertsConfig(n_experts=4, top_k=2, d_ffn=8, d_low=4, score_gradient="sparse")
    with pytest.raises(UserError, match="score_gradient='sparse': is exact only where weights"):
        jax.eval_shape(AoELayer(experts, routing=TopP()).init, jax.random.key(0), X)


def test_remat():
    """`training` may be a static positional argument, and remat does not change gradients."""
    variables = drawn(LAYERS["aoe"])
    remat = nn.remat(AoE, static_argnums=(3,))(**SIZES, d_wide=16)

    def loss(layer):
        return lambda variables: (layer.apply(variables, X, None, True)[0] ** 2).sum()

    got, want = (jax.jit(jax.grad(loss(layer)))(variables) for layer in (remat, LAYERS["aoe"]))
    assert_close(got, want, 2e-5)


def test_public_names():
    """The documentation has all public names of the package, and all can be imported."""
    root = Path(aoe_jax.__file__).parent
    assert (root / "py.typed").exists()
    assert all(callable(getattr(aoe_jax, name)) for name in aoe_jax.__all__)
    page = (root.parent / "docs/reference/layer_details.md").read_text()
    assert set(aoe_jax.__all__) <= set(re.findall(r"`(\w+)", page)) & set(dir(aoe_jax))
