"""Kernels against plain references in float32, on all devices of a mesh at the same time.

The error of an array is the largest over its blocks of 128 rows: the norm of the difference from
the reference over the norm of the reference. It is infinite where a number is not finite.

    tolerance = roundings * eps + sqrt(terms) * eps(float32)

where eps is that of the dtype of computation and `terms` the length of the longest sum. `roundings`
counts roundings to this dtype in a forward pass: 1 in a grouped product (its result), 2 in
attention (probabilities and result), 4 in a layer (gate, up projection, their product and the
result). Platforms that multiply float32 in a shorter format have the eps of that format.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aoe_jax.config.run import Config
from aoe_jax.counts import experts_per_token
from aoe_jax.model.attention import causal_attention
from aoe_jax.model.attention.reference import reference_attention
from aoe_jax.moe import reference
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.sharding import MESH_AXES

PRODUCT_EPS = {"tpu": 2**-7, "gpu": 2**-10}  # of float32 operands: bfloat16 and TF32
BLOCK = 128  # rows whose error is computed together, such as positions of a head
LAYER_TOKENS, LAYER_EXPERTS = 2048, 8  # at most; the reference computes all experts for all tokens


class Case(NamedTuple):
    """A kernel at one shape, and its reference: jitted functions of drawn arrays and an input."""

    kernel: str
    shape: str  # in words
    results: tuple  # names of what both functions return
    function: Callable
    reference: Callable
    arrays: list  # shapes of the drawn arrays
    inputs: dict  # the last argument by name, which is not drawn
    roundings: int
    terms: int


def everywhere(mesh, function):
    """The jitted function, computed by every device on its own copy of the arguments."""
    spec = PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def drawn(mesh, shapes, dtype):
    """Arrays of standard normal numbers, a copy on every device."""

    def draw():
        sizes = [math.prod(shape) for shape in shapes]
        # One draw by the cheapest generator: compiling several would take longer than all the rest.
        flat = jax.random.normal(jax.random.key(0, impl="unsafe_rbg"), sum(sizes), jnp.float32)
        parts = jnp.split(flat.astype(dtype), np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    return jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def value_and_gradients(function, args, g):
    """`(function(*args), gradients of args for the result's gradient g)`."""
    y, pull_back = jax.vjp(function, *args)
    return y, *pull_back(g)


def exactly(function, dtype):
    """The function with floating arguments in float32, and with products that are exact enough to
    compare results in `dtype` with.
    """

    def widened(a):
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def call(*args):
        # On TPU, "highest" takes twice as long to compile and to run.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "high"):
            return function(*jax.tree.map(widened, args))

    return call


def check(case: Case, mesh, dtype):
    """Computes a case for each of its inputs.

    Returns:
      A list of `{"kernel", "shape", "input", "errors" by result, "device", "tolerance", "passed"}`;
      an error is the largest of all devices, and `device` has the largest error of all results.
    """
    eps = float(jnp.finfo(dtype).eps)
    if dtype == "float32":
        eps = PRODUCT_EPS.get(mesh.devices.flat[0].platform, eps)
    tolerance = case.roundings * eps + math.sqrt(case.terms) * float(jnp.finfo(jnp.float32).eps)

    def errors(got, want):
        found = [_relative_error(a, b) for a, b in zip(got, want, strict=True)]
        return jax.lax.all_gather(jnp.stack(found), MESH_AXES)

    compare, args, results = everywhere(mesh, errors), drawn(mesh, case.arrays, dtype), []
    for name, given in case.inputs.items():
        of_devices = np.asarray(compare(case.function(*args, given), case.reference(*args, given)))
        worst = dict(zip(case.results, of_devices.max(axis=0).tolist(), strict=True))
        results.append(
            {
                "kernel": case.kernel,
                "shape": case.shape,
                "input": name,
                "errors": worst,
                "device": str(mesh.devices.flat[of_devices.max(axis=1).argmax()]),
                "tolerance": tolerance,
                "passed": max(worst.values()) <= tolerance,
            }
        )
    return results


def _relative_error(got, want):
    got, want = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (got, want))
    block, n_blocks = jnp.arange(len(want)) // BLOCK, math.ceil(len(want) / BLOCK)

    def squares(a):
        return jax.ops.segment_sum(jnp.square(a).sum(axis=1), block, n_blocks)

    norm = squares(want)
    # Some kernels subtract: where a block is almost zero, they have rounding errors of the others.
    # An array may be all zeros.
    floor = jnp.maximum(1e-2 * norm.mean(), jnp.finfo(jnp.float32).tiny)
    error = jnp.sqrt((squares(got - want) / jnp.maximum(norm, floor)).max())
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


def sequences_per_device(config: Config):
    """Sequences of a step that a device holds; devices along the tensor axis share theirs."""
    return config.train.batch_size // math.prod(config.mesh.shape[:3])


def attention_shape(config: Config):
    """`(H, G, S, h)` of a device."""
    m, tensor = config.model, config.mesh.tensor
    return (m.n_heads // tensor, m.kv_heads // tensor, config.data.seq_len, m.d_model // m.n_heads)


def attention_cases(config: Config, mesh, backend):
    """Cases of the attention of a configuration: causal, with documents, with grouped heads."""
    n_heads, n_kv, s, h = attention_shape(config)
    b = min(2, sequences_per_device(config))
    kinds = {"causal": (n_kv, False), "documents": (n_kv, True)}
    if n_kv == n_heads > 1:
        kinds["documents, grouped heads"] = (1, True)
    return [
        _attention_case(config, mesh, backend, name, (b, n_heads, n_kv, s, h), has_documents)
        for name, (n_kv, has_documents) in kinds.items()
    ]


def _attention_case(config, mesh, backend, name, shape, has_documents):
    b, n_heads, n_kv, s, h = shape
    starts = np.random.default_rng(0).random((b, s)) < 4 / s
    documents = np.cumsum(starts, axis=1, dtype=np.int32) if has_documents else None

    def kernel(q, k, v, g, documents):
        attend = lambda q, k, v: causal_attention(q, k, v, documents, backend=backend)  # noqa: E731
        return value_and_gradients(attend, (q, k, v), g)

    def plain(q, k, v, g, documents):
        # One head of keys at a time: all scores [B, H, S, S] may exceed the memory.
        def of_head(args):
            attend = lambda q, k, v: reference_attention(q, k, v, documents)  # noqa: E731
            return value_and_gradients(attend, args[:3], args[3])

        by_head = [jnp.moveaxis(a.reshape(b, n_kv, -1, s, h), 1, 0) for a in (q, k, v, g)]
        found = jax.lax.map(of_head, tuple(by_head))
        return tuple(jnp.moveaxis(a, 0, 1).reshape(b, -1, s, h) for a in found)

    return Case(
        kernel=f"attention {backend}",
        shape=f"{b}x{n_heads}x{n_kv}x{s}x{h} (BxHxGxSxh)",
        results=("y", "d_q", "d_k", "d_v"),
        function=everywhere(mesh, kernel),
        reference=everywhere(mesh, exactly(plain, config.model.dtype)),
        arrays=[(b, n, s, h) for n in (n_heads, n_kv, n_kv, n_heads)],
        inputs={name: documents},
        roundings=2,
        terms=s,
    )


def expert_shapes(config: Config):
    """The shapes `(E, D, F)` of the grouped products of a layer, by weight, on a device; none for a
    layer that has no rows by expert.
    """
    if config.experts.kind not in ("aoe", "router"):
        return {}
    mesh, sizes = config.mesh, config.experts.sizes(config.model.d_model)
    sizes |= {"n": sizes["n"] // mesh.expert, "f": sizes["f"] // mesh.tensor}
    declared = ExpertsLayer(config.experts, config.routing).parameters
    return {name: p.shape(sizes) for name, p in declared.items() if p.per_expert}


def rows_per_device(config: Config):
    """Rows of a grouped product under balanced loads."""
    k = experts_per_token(config) or config.experts.top_k
    return round(sequences_per_device(config) * config.data.seq_len * k)


def group_sizes(m, n_experts):
    """Ways of m rows to fall into groups, by name: random choices; uneven groups, an empty one
    among them, and a tenth of the rows in none; one group.
    """
    rng = np.random.default_rng(0)
    even = rng.multinomial(m, np.full(n_experts, 1 / n_experts))
    uneven = rng.multinomial(m * 9 // 10, rng.dirichlet(np.full(n_experts, 0.5)))
    if n_experts > 1:
        uneven[0], uneven[n_experts // 2] = uneven[0] + uneven[n_experts // 2], 0
    one = m * np.eye(n_experts)[-1]
    sizes = {"random": even, "uneven": uneven, "one group": one}
    return {name: rows.astype(np.int32) for name, rows in sizes.items()}


def grouped_arrays(m, shape):
    """The shapes of rows, weights and the gradient of the result."""
    n, d, f = shape
    return [(m, d), (n, d, f), (m, f)]


def grouped_case(config: Config, mesh, backend, shape):
    """The case of a grouped product and its two gradients, weights `[E, D, F]` of `shape`."""
    m, (n, d, f) = rows_per_device(config), shape

    def kernel(rows, weights, g, sizes):
        product = lambda rows, weights: grouped_matmul(rows, weights, sizes)  # noqa: E731
        return value_and_gradients(product, (rows, weights), g)

    def plain(rows, weights, g, sizes):
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(m), side="right")

        def add(sums, one):
            number, w = one
            own_rows, own_g = (jnp.where((expert == number)[:, None], a, 0) for a in (rows, g))
            y, d_rows = sums
            sums = y + exact(own_rows, w), d_rows + exact(own_g, w.T)
            return sums, exact(own_rows.T, own_g)

        exact = partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
        zeros = jnp.zeros(g.shape), jnp.zeros(rows.shape)
        (y, d_rows), d_weights = jax.lax.scan(add, zeros, (jnp.arange(n), weights))
        return y, d_rows, d_weights

    return Case(
        kernel=f"grouped products {backend}",
        shape=f"{m}x{d}x{f}x{n} (MxDxFxE)",
        results=("y", "d_rows", "d_weights"),
        function=everywhere(mesh, kernel),
        reference=everywhere(mesh, plain),
        arrays=grouped_arrays(m, shape),
        inputs=group_sizes(m, n),
        roundings=1,
        terms=max(m, d, f),
    )


def layer_case(config: Config, mesh, name):
    """The case of a layer of experts on the mesh, against Algorithm 1 or 2.

    Every token takes all experts, up to `LAYER_EXPERTS` a device: with fewer, rounding may change
    the choice. The score is the norm: rounding may change which activation is the largest.
    """
    c, d, axes = config.mesh, config.model.d_model, config.mesh.shape
    n = min(config.experts.n_experts, LAYER_EXPERTS * c.expert)
    experts = dataclasses.replace(config.experts, n_experts=n, top_k=n, score="norm")
    layer = ExpertsLayer(
        experts,
        dtype=config.model.dtype,
        remat=config.model.remat,
        transport=c.transport,
        training=True,
    )
    positions = min(config.data.seq_len // c.tensor, max(LAYER_TOKENS // math.prod(axes), 8))
    x_shape = (math.prod(axes[:3]), positions * c.tensor, d)
    sizes = experts.sizes(d)
    router = [] if experts.kind == "aoe" else ["w_router"]
    gate = ["w_gate_down", "w_gate_up"] if experts.low_rank else ["w_gate"]
    names = [*router, *gate, "w_up", "w_down"]

    def gradients(function, x, g, *weights_and_none):
        *weights, _ = weights_and_none
        # Weights keep the variance of tokens; a power of two and a cast change no value.
        scales = [2.0 ** round(-math.log2(w.shape[-2]) / 2) for w in weights]
        weights = [w.astype(jnp.float32) * s for w, s in zip(weights, scales, strict=True)]
        return value_and_gradients(function, (x, *weights), g)

    def apply(x, *weights):
        params = dict(zip(names, weights, strict=True))
        return layer.apply({"params": params}, x)[0]

    def plain(x, *weights):
        # Expert by expert in a loop, which compiles fast. Where a token takes all experts, its
        # weights are the softmax over all scores.
        tokens = x.reshape(-1, d)
        matrices = weights[len(router) :]
        of_experts = reference.aoe_experts if experts.low_rank else reference.router_experts
        if router:
            scores = tokens @ weights[0]
        else:
            of_one = lambda w: reference.aoe_scores(tokens, w[None])[:, 0]  # noqa: E731
            scores = jax.lax.map(of_one, weights[0][..., : experts.score_neurons]).T

        def add(y, one):
            weight, *w = one
            return y + of_experts(tokens, weight[:, None], *(a[None] for a in w)), None

        y, _ = jax.lax.scan(add, jnp.zeros_like(tokens), (jax.nn.softmax(scores).T, *matrices))
        return y.reshape(x.shape)

    return Case(
        kernel=f"{name} layer",
        shape=f"{'x'.join(map(str, x_shape))} (BxSxd), {n} experts",
        results=("y", "d_x", *(f"d_{weight}" for weight in names)),
        function=jax.jit(partial(gradients, apply)),
        reference=everywhere(mesh, exactly(partial(gradients, plain), config.model.dtype)),
        arrays=[x_shape, x_shape, *(layer.parameters[name].shape(sizes) for name in names)],
        inputs={"all experts": None},
        roundings=4,
        terms=max(*sizes.values(), math.prod(x_shape[:2])),
    )
