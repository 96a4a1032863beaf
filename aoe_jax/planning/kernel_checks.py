"""Checks kernels against plain float32 references, on all devices of a mesh at the same time.

The error of an array is the largest error of its blocks of 128 rows. The error of a block is
|result - reference| / |reference| with L2 norms, or infinity if this ratio is not finite.

    tolerance = roundings * eps + sqrt(terms) * eps(float32)

where eps is the machine epsilon of the compute dtype (if it is float32, of the shorter format to
which the platform rounds the factors of products). `terms` is the number of terms of the longest
sum. `roundings` is the number of roundings to the compute dtype in a forward pass: 1 in a grouped
product (result), 2 in attention (probabilities, result), 4 in a layer (gate, up, product, result).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from aoe_jax.config.run import Config
from aoe_jax.model.attention import causal_attention
from aoe_jax.model.attention.reference import reference_attention
from aoe_jax.model.counts import experts_per_token
from aoe_jax.moe import reference
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.layer import ExpertsLayer, parameters_of
from aoe_jax.sharding import MESH_AXES, replicated

PRODUCT_EPS = {"tpu": 2**-7, "gpu": 2**-10}  # TPUs round float32 to bfloat16, GPUs to TF32
BLOCK = 128  # rows whose error is computed together, such as positions of a head
LAYER_TOKENS, LAYER_EXPERTS = 2048, 8  # limits, as the reference runs all experts on all tokens


class Case(NamedTuple):
    """A kernel at one shape, and its reference. Both have the same arguments: arrays, then values
    of one of the `inputs`.
    """

    kernel: str
    shape: str  # in words
    arguments: dict  # array argument -> its shape; filled with standard normal numbers
    result: tuple  # shape of the result
    function: Callable
    reference: Callable
    inputs: dict  # name of an input -> tuple of the arguments after the arrays
    roundings: int
    terms: int
    is_collective: bool = False  # True: the devices of the mesh compute `function` together


def everywhere(mesh, function):
    """Returns a jitted function that every device computes on its own copy of the arguments."""
    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
    return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))


def drawn(mesh, shapes, dtype):
    """Returns arrays of standard normal numbers, with a copy on every device."""
    rng, copies = np.random.default_rng(0), replicated(mesh)
    arrays = [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]
    return [jax.make_array_from_callback(a.shape, copies, a.__getitem__) for a in arrays]


def with_gradients(function):
    """Returns `(arrays, g, given) -> (y, *gradients)`; y = function(*arrays, *given), g = dL/dy."""

    def call(arrays, g, given):
        y, pull_back = jax.vjp(lambda *arrays: function(*arrays, *given), *arrays)
        return y, *pull_back(g)

    return call


def exactly(function, dtype):
    """Returns `function` in float32 at high matmul precision, the reference for `dtype`."""

    def widened(a):
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def call(*args):
        # "high" is enough for narrow dtypes; "highest" doubles compile time and run time on TPU.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "high"):
            return function(*jax.tree.map(widened, args))

    return call


def check(case: Case, mesh, dtype):
    """Computes a case and its reference for each input.

    Returns a list of `{"input", "tolerance", "errors", "device", "passed"}`. `errors` maps each
    result to its largest error over all devices. `device` is the device with the largest error.
    """
    eps = float(jnp.finfo(dtype).eps)
    if dtype == "float32":
        eps = PRODUCT_EPS.get(mesh.devices.flat[0].platform, eps)
    tolerance = case.roundings * eps + math.sqrt(case.terms) * float(jnp.finfo(jnp.float32).eps)

    def errors(got, want):
        found = [_relative_error(a, b) for a, b in zip(got, want, strict=True)]
        return jax.lax.all_gather(jnp.stack(found), MESH_AXES)

    function, compare = with_gradients(case.function), everywhere(mesh, errors)
    function = jax.jit(function) if case.is_collective else everywhere(mesh, function)
    reference = everywhere(mesh, exactly(with_gradients(case.reference), dtype))
    names, results = ["y", *(f"d_{name}" for name in case.arguments)], []
    *arrays, g = drawn(mesh, [*case.arguments.values(), case.result], dtype)
    for name, given in case.inputs.items():
        args = arrays, g, given
        of_devices = np.asarray(compare(function(*args), reference(*args)))
        result = {
            "input": name,
            "tolerance": tolerance,
            "errors": dict(zip(names, of_devices.max(axis=0).tolist(), strict=True)),
            "device": str(mesh.devices.flat[of_devices.max(axis=1).argmax()]),
            "passed": bool(of_devices.max() <= tolerance),
        }
        results.append(result)
    return results


def _relative_error(got, want):
    got, want = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (got, want))
    block, n_blocks = jnp.arange(len(want)) // BLOCK, math.ceil(len(want) / BLOCK)

    def squares(a):
        return jax.ops.segment_sum(jnp.square(a).sum(axis=1), block, n_blocks)

    norm = squares(want)
    # The norm has a floor, because an array may be all zeros, and because some kernels subtract
    # large numbers: then a block near zero has rounding errors as large as those of other blocks.
    floor = jnp.maximum(1e-2 * norm.mean(), jnp.finfo(jnp.float32).tiny)
    error = jnp.sqrt((squares(got - want) / jnp.maximum(norm, floor)).max())
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


def sequences_per_device(config: Config):
    """Returns the sequences per device; devices along the tensor axis have the same sequences."""
    return config.train.batch_size // config.mesh.batch_shards


def attention_cases(config: Config, backend):
    """Returns cases of attention: causal, with documents, and with grouped heads."""
    m, s, h = config.model, config.data.seq_len, config.model.head_width
    n_heads, n_kv = m.n_heads // config.mesh.tensor, m.kv_heads // config.mesh.tensor
    b = min(2, sequences_per_device(config))
    starts = np.random.default_rng(0).random((b, s)) < 4 / s
    documents = (np.cumsum(starts, axis=1, dtype=np.int32),)
    inputs = {"causal": (), "documents": documents}
    cases = [attention_case(backend, (b, n_heads, n_kv, s, h), inputs)]
    if n_kv == n_heads > 1:
        inputs = {"documents, grouped heads": documents}
        cases.append(attention_case(backend, (b, n_heads, 1, s, h), inputs))
    return cases


def attention_case(backend, shape, inputs):
    """Returns the case of shape (B, heads, key heads, S, width); inputs are () or (documents,)."""
    b, n_heads, n_kv, s, h = shape

    def plain(q, k, v, *documents):
        # One head of keys at a time: all scores [B, H, S, S] may exceed the memory.
        by_head = tuple(jnp.moveaxis(a.reshape(b, n_kv, -1, s, h), 1, 0) for a in (q, k, v))
        of_head = jax.checkpoint(lambda qkv: reference_attention(*qkv, *documents))
        return jnp.moveaxis(jax.lax.map(of_head, by_head), 0, 1).reshape(b, -1, s, h)

    queries, keys = (b, n_heads, s, h), (b, n_kv, s, h)
    return Case(
        kernel=f"attention {backend}",
        shape=f"{b}x{n_heads}x{n_kv}x{s}x{h} (BxHxGxSxh)",
        arguments={"q": queries, "k": keys, "v": keys},
        result=queries,
        function=partial(causal_attention, backend=backend),
        reference=plain,
        inputs=inputs,
        roundings=2,
        terms=s,
    )


def expert_shapes(config: Config):
    """Returns `{weight: (E, D, F)}` of a layer's grouped products per device; {} if it has none."""
    if config.experts.kind not in ("aoe", "router"):
        return {}
    mesh, sizes = config.mesh, config.experts.sizes(config.model.d_model)
    sizes |= {"n": sizes["n"] // mesh.expert, "f": sizes["f"] // mesh.tensor}
    declared = parameters_of(config.experts, config.routing)
    return {name: p.shape(sizes) for name, p in declared.items() if p.per_expert}


def rows_per_device(config: Config):
    """Returns the rows of a grouped product per device under balanced loads."""
    k = experts_per_token(config) or config.experts.top_k
    return round(sequences_per_device(config) * config.data.seq_len * k)


def group_sizes(m, n_experts):
    """Returns group sizes by name; in "uneven" a group is empty, and m/10 rows are in no group."""
    rng = np.random.default_rng(0)
    even = rng.multinomial(m, np.full(n_experts, 1 / n_experts))
    uneven = rng.multinomial(m * 9 // 10, rng.dirichlet(np.full(n_experts, 0.5)))
    if n_experts > 1:
        uneven[0], uneven[n_experts // 2] = uneven[0] + uneven[n_experts // 2], 0
    one = m * np.eye(n_experts)[-1]
    sizes = {"random": even, "uneven": uneven, "one group": one}
    return {name: rows.astype(np.int32) for name, rows in sizes.items()}


def grouped_case(config: Config, backend, shape):
    """Returns the case of a grouped product with weights of shape `(E, D, F)`."""
    m, (n, d, f) = rows_per_device(config), shape

    def plain(rows, weights, sizes):
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(m), side="right")

        @jax.checkpoint  # otherwise the masked rows of all experts are stored
        def product(number, w):
            return jnp.where((expert == number)[:, None], rows, 0) @ w

        def add(y, one):
            return y + product(*one), None

        return jax.lax.scan(add, jnp.zeros((m, f)), (jnp.arange(n), weights))[0]

    return Case(
        kernel=f"grouped products {backend}",
        shape=f"{m}x{d}x{f}x{n} (MxDxFxE)",
        arguments={"rows": (m, d), "weights": shape},
        result=(m, f),
        function=partial(grouped_matmul, backend=backend),
        reference=plain,
        inputs={name: (sizes,) for name, sizes in group_sizes(m, n).items()},
        roundings=1,
        terms=max(m, d, f),
    )


def layer_case(config: Config):
    """Returns the case of an MoE layer on the mesh, with the paper's Algorithm 1 or 2 as reference;
    None if neither algorithm describes the layer.

    Every token is routed to all experts, because rounding may change a choice. The score is the
    norm, because rounding may change which activation is the largest. A shared expert is left out.
    """
    e = config.experts
    if e.kind not in ("aoe", "router") or e.large_router or (e.low_rank and e.kind == "router"):
        return None
    c, d, axes = config.mesh, config.model.d_model, config.mesh.shape
    n = min(e.n_experts, max(LAYER_EXPERTS // c.expert, 2) * c.expert)
    changes = {"n_experts": n, "top_k": n, "score": "norm", "d_shared": 0, "shared_gate": False}
    experts = dataclasses.replace(e, **changes)
    settings = {"dtype": config.model.dtype, "remat": config.model.remat, "training": True}
    layer = ExpertsLayer(experts, **settings, transport=c.transport)
    positions = min(config.data.seq_len // c.tensor, max(LAYER_TOKENS // math.prod(axes), 8))
    x_shape = (c.batch_shards, positions * c.tensor, d)
    sizes, router = experts.sizes(d), ["w_router"] if experts.kind == "router" else []
    gate = ["w_gate_down", "w_gate_up"] if experts.low_rank else ["w_gate"]
    names = [*router, *gate, "w_up", "w_down"]
    declared = parameters_of(experts, layer.routing)
    of_experts = reference.aoe_experts if experts.low_rank else reference.router_experts

    def scaled(weights):  # by a power of two near 1 / sqrt(D), so that x W has the variance of x
        return [w.astype(jnp.float32) * 2.0 ** round(-math.log2(w.shape[-2]) / 2) for w in weights]

    def apply(x, *weights):
        params = dict(zip(names, scaled(weights), strict=True))
        return layer.apply({"params": params}, x)[0]

    def plain(x, *weights):
        tokens, (first, *others) = x.reshape(-1, d), scaled(weights)
        if router:
            scores, matrices = tokens @ first, others
        else:
            w_score, matrices = first[..., : experts.score_neurons], [first, *others]
            scores = reference.aoe_scores(tokens, w_score)
        y = of_experts(tokens, reference.top_k_weights(scores, n), *matrices)
        return y.reshape(x.shape)

    return Case(
        kernel="MoE layer" if router else "AoE layer",
        shape=f"{'x'.join(map(str, x_shape))} (BxSxd), {n} experts",
        arguments={"x": x_shape, **{w: declared[w].shape(sizes) for w in names}},
        result=x_shape,
        function=apply,
        reference=plain,
        inputs={"all experts": ()},
        roundings=4,
        terms=max(*sizes.values(), math.prod(x_shape[:2])),
        is_collective=True,
    )
