"""What a program communicates, read from its jaxpr: every collective, how often it runs, and the
bytes a device receives.
"""

import math

from jax.extend import core as jax_core

from aoe_jax.experts import transport


def _sub_jaxprs(eqn):
    """`(jaxpr, how many times it runs)` of an equation, all branches of a condition among them."""
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for value in eqn.params.values():
        for sub in value if isinstance(value, list | tuple) else [value]:
            if isinstance(sub, jax_core.ClosedJaxpr):
                yield sub.jaxpr, times
            elif isinstance(sub, jax_core.Jaxpr):
                yield sub, times


# What a device receives, from the bytes of the larger of operand and result, over N devices.
_RECEIVED = {
    "all_gather": lambda size, n: size * (n - 1) / n,
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "all_to_all": lambda size, n: size * (n - 1) / n,
    "ragged_all_to_all": lambda size, n: size * (n - 1) / n / transport.ROW_BUFFER,
    "psum": lambda size, n: 2 * size * (n - 1) / n,
    "pmax": lambda size, n: 2 * size * (n - 1) / n,
}

_SAME = {"name", "stop_gradient"}  # results are the arguments
_MERGED = {
    "all_gather",
    "convert_element_type",
    "reshape",
    "squeeze",
    "transpose",
}  # equal of equal arguments
# Parts of the body they are in.
_INLINE = {"closed_call", "custom_vjp_call", "jit", "pjit", "remat2", "checkpoint", "shard_map"}


def each_collective(jaxpr, arguments=None, known=None):
    """`(equation, how many times it runs)` of a program; 0 times within loops of unknown length.

    What a body gathers twice of the same array, with no barrier between, counts once: the compiler
      merges it.

    Args:
      jaxpr: the program, or a part of it.
      arguments: an object for each argument of a part, the same for the same array.
      known: `{equation of _MERGED: its result}` in the body around a part.
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
    """What the arguments of a part are within it."""
    if (
        eqn.primitive.name == "shard_map"
    ):  # pieces, which differ where the same array is split in another way
        return [
            (value, str(spec)) for value, spec in zip(inputs, eqn.params["in_specs"], strict=True)
        ]
    if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
        return None  # behind a barrier
    return inputs


def collectives(jaxpr, sizes):
    """`{(kind, mesh axes): [count, bytes received by a device]}` of a program; loops of unknown
    length count nothing.
    """
    total = {}
    for eqn, times in each_collective(jaxpr):
        if times == 0:
            continue
        kind = eqn.primitive.name
        axes = eqn.params.get("axes", eqn.params.get("axis_name"))
        axes = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
        n = math.prod(sizes[axis] for axis in axes)
        operands = (
            eqn.invars[:1] if kind == "ragged_all_to_all" else eqn.invars
        )  # the rest are offsets and sizes
        size = max(
            sum(v.aval.size * v.aval.dtype.itemsize for v in side)
            for side in (operands, eqn.outvars)
        )
        entry = total.setdefault((kind, axes), [0, 0.0])
        entry[0] += times
        entry[1] += times * _RECEIVED[kind](size, n)
    return total
