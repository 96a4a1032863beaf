"""The collectives of a program, from its jaxpr: how often each runs, and the bytes received."""

import math

from jax.extend import core as jax_core

from aoe_jax.moe.parallel import transports


def _sub_jaxprs(eqn):
    """Yields `(jaxpr, how many times it runs)` of an equation, with all branches of a condition."""
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for value in eqn.params.values():
        for sub in value if isinstance(value, list | tuple) else [value]:
            if isinstance(sub, jax_core.ClosedJaxpr):
                yield sub.jaxpr, times
            elif isinstance(sub, jax_core.Jaxpr):
                yield sub, times


# Bytes that a device receives, by the bytes of the larger of operand and result, on n devices.
_RECEIVED = {
    "all_gather": lambda size, n: size * (n - 1) / n,
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "all_to_all": lambda size, n: size * (n - 1) / n,
    "ragged_all_to_all": lambda size, n: size * (n - 1) / n / transports.ROW_BUFFER,
    "psum": lambda size, n: 2 * size * (n - 1) / n,
    "pmax": lambda size, n: 2 * size * (n - 1) / n,
}

_SAME = {"name", "stop_gradient"}  # the result is the argument
# The compiler merges equal equations of these kinds.
_MERGED = {"all_gather", "convert_element_type", "reshape", "squeeze", "transpose"}
# The parts of these equations belong to the body around them.
_INLINE = {"closed_call", "custom_vjp_call", "jit", "pjit", "remat2", "checkpoint", "shard_map"}


def each_collective(jaxpr, arguments=None, known=None):
    """Yields `(equation, how many times it runs)`; 0 times within loops of unknown length.

    If a body gathers the same array twice with no barrier between, it counts once: the compiler
    merges it.

    Args:
      jaxpr: the program, or a part of it.
      arguments: an object for each argument of a part, the same one for the same array.
      known: results of the equations of `_MERGED` in the body around a part.
    """
    known = {} if known is None else known
    values = dict(zip(jaxpr.invars, arguments or [object() for _ in jaxpr.invars], strict=True))
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [
            object() if isinstance(v, jax_core.Literal) else values.setdefault(v, object())
            for v in eqn.invars
        ]
        if name in _SAME:
            values[eqn.outvars[0]] = inputs[0]
        if name in _MERGED:
            key = (name, str(eqn.params), *inputs)
            seen = key in known
            values[eqn.outvars[0]] = known.setdefault(key, object())
            if seen:
                continue
        if name in _RECEIVED:
            yield eqn, 1
        for sub, times in _sub_jaxprs(eqn):
            part = (_inside(eqn, inputs), known) if name in _INLINE else ()
            for inner, inner_times in each_collective(sub, *part):
                yield inner, 0 if name == "while" else times * inner_times


def _inside(eqn, inputs):
    """The arguments of a part, as the part has them."""
    if eqn.primitive.name == "shard_map":  # the same array may be split in several ways
        specs = eqn.params["in_specs"]
        return [(value, str(spec)) for value, spec in zip(inputs, specs, strict=True)]
    if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
        return None  # behind a barrier
    return inputs


def collectives(jaxpr, sizes):
    """The collectives of a program; those in loops of unknown length are left out.

    Args:
      jaxpr: the program.
      sizes: the size of each mesh axis.

    Returns:
      `{(kind, mesh axes): [count, bytes received by a device]}`.
    """
    total = {}
    for eqn, times in each_collective(jaxpr):
        if times == 0:
            continue
        kind = eqn.primitive.name
        axes = eqn.params.get("axes", eqn.params.get("axis_name"))
        axes = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
        n = math.prod(sizes[axis] for axis in axes)
        operands = eqn.invars
        if kind == "ragged_all_to_all":
            operands = operands[:1]  # the others are offsets and sizes
        size = max(
            sum(v.aval.size * v.aval.dtype.itemsize for v in side)
            for side in (operands, eqn.outvars)
        )
        entry = total.setdefault((kind, axes), [0, 0.0])
        entry[0] += times
        entry[1] += times * _RECEIVED[kind](size, n)
    return total
