"""Counts the executions of the collectives in a jaxpr, and the bytes that a device receives."""

import math

from jax.extend import core as jax_core

from aoe_jax.moe import transports

# kind -> factor: each of n devices receives factor * (n - 1) / n * max(operand, result) bytes.
_RECEIVED = {
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "ragged_all_to_all": 1 / transports.ROW_BUFFER,
    "psum": 2,
    "pmax": 2,
}
# The compiler merges equal equations of these kinds.
_MERGED = {"all_gather", "convert_element_type", "reshape", "squeeze", "transpose"}
# Equations in the jaxprs of these primitives may merge with equations of the enclosing jaxpr.
_INLINE = {"closed_call", "custom_vjp_call", "jit", "pjit", "remat2", "checkpoint", "shard_map"}


def each_collective(jaxpr, arguments=None, known=None):
    """Yields `(collective, number of executions)`; the number is 0 in loops of unknown length.

    The compiler merges two gathers of an array with no barrier between them, so they count once.
    For nested jaxprs, `arguments` has an identifier for each argument (the same for equal arrays),
    and `known` maps earlier equations of `_MERGED` kinds to identifiers of their results.
    """
    known = {} if known is None else known
    values = dict(zip(jaxpr.invars, arguments or [object() for _ in jaxpr.invars], strict=True))
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [
            object() if isinstance(v, jax_core.Literal) else values.setdefault(v, object())
            for v in eqn.invars
        ]
        if name in ("name", "stop_gradient"):  # the result equals the argument
            values[eqn.outvars[0]] = inputs[0]
        if name in _MERGED:
            key = (name, str(eqn.params), *inputs)
            seen = key in known
            values[eqn.outvars[0]] = known.setdefault(key, object())
            if seen:
                continue
        if name in _RECEIVED:
            yield eqn, 1
        times = {"scan": eqn.params.get("length"), "while": 0}.get(name, 1)
        for sub in _parts(eqn):
            of_body = (_inside(eqn, inputs), known) if name in _INLINE else ()
            for inner, inner_times in each_collective(sub, *of_body):
                yield inner, times * inner_times


def _parts(eqn):
    """Yields the jaxprs inside an equation, including all branches of a `cond`."""
    for value in eqn.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, jax_core.ClosedJaxpr | jax_core.Jaxpr):
                yield getattr(part, "jaxpr", part)


def _inside(eqn, inputs):
    """Returns `arguments` of `each_collective` for a jaxpr in `eqn`; None: all arrays are new."""
    if eqn.primitive.name == "shard_map":  # one array with two shardings counts as two arrays
        specs = eqn.params["in_specs"]
        return [(value, str(spec)) for value, spec in zip(inputs, specs, strict=True)]
    if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
        return None  # a barrier prevents merging with equations outside
    return inputs


def collectives(jaxpr, sizes):
    """Counts the collectives of a program by kind and mesh axes; `sizes` maps an axis to its size.

    Returns `{(kind, axes): [count, bytes received by a device]}`, without loops of unknown length.
    """
    total = {}
    for eqn, times in each_collective(jaxpr):
        if times == 0:
            continue
        kind = eqn.primitive.name
        axes = eqn.params.get("axes", eqn.params.get("axis_name"))
        axes = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
        groups = eqn.params.get("axis_index_groups")
        n = len(groups[0]) if groups else math.prod(sizes[axis] for axis in axes)
        # Only the first operand of ragged_all_to_all is data, the others are offsets and sizes.
        operands = eqn.invars[:1] if kind == "ragged_all_to_all" else eqn.invars
        size = max(_bytes(operands), _bytes(eqn.outvars))
        entry = total.setdefault((kind, axes), [0, 0.0])
        entry[0] += times
        entry[1] += times * _RECEIVED[kind] * size * (n - 1) / n
    return total


def _bytes(variables):
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
