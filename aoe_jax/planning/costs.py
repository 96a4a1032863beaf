"""Computes the cost of each operation in the optimised HLO of a program: memory traffic, FLOPs,
cycles, collectives and likely time. The cost of a loop's body is multiplied by the trip count.
(XLA's `cost_analysis()` counts the body once, and does not know the cost of Pallas kernels.)

- Memory traffic is the number of bytes that an operation reads from HBM and writes to HBM, with the
  padding of the layout. Arrays in on-chip memory (`S(1)` on TPU) are not counted. A slice reads
  only the selected elements, and an in-place update writes only the changed elements.
- FLOPs are those of matrix products and convolutions, two for each multiply-add, and those of
  kernels. Cycles are the estimate of the TPU compiler. For fusions it is close; for other
  operations, such as sums, copies and broadcasts, it is up to 24 times what their memory traffic
  takes. Launching a kernel is assumed to be free.
- A loop of unknown length is assumed to run zero times. Our programs have such loops only for the
  extra rounds of expert parallelism (`moe/transports.py`), and balanced loads need no
  extra rounds. The cost of a conditional is the cost of its branch with the most FLOPs or, if
  FLOPs are equal, the most traffic.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from aoe_jax.planning.hlo import parse
from aoe_jax.planning.kernel_costs import KERNEL_COSTS

ESTIMATES = ("peaks", "likely", "cycles")
_BY_CYCLES = {"fusion", "convolution", "dot", "gather", "scatter", "sort"}
# Named scopes of the train step.
SCOPES = {"embed", "attention", "score", "route", "balance", "schedule", "dispatch", "experts"}
SCOPES |= {"combine", "loss", "update"}
# Operations without a cost. The cost of a `-done` operation is counted in its `-start`.
_FREE = {"add-dependency", "after-all", "async-update", "bitcast", "constant", "domain", "tuple"}
_FREE |= {"get-dimension-size", "get-tuple-element", "opt-barrier", "parameter"}
_FREE |= {"partition-id", "replica-id"}
_ASYNC = ("AsyncCollectiveStart", "AsyncCollectiveDone")
_FREE_KERNELS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone"}
_FREE_KERNELS |= {"ConcatBitcast", "GatherScatterIndicesBitpacked"}


@dataclass(frozen=True)
class Operation:
    """The cost of one instruction of the HLO."""

    name: str
    opcode: str
    op_name: str  # the path of named scopes and transformations in JAX
    times: float = 1  # executions per run of the program
    hbm_bytes: float = 0.0  # bytes per execution, like the fields below
    flops: float = 0.0
    # FLOPs that a fully used matrix unit would compute in the same time; at least `flops`.
    occupied_flops: float = 0.0
    cycles: float | None = None
    collective: str | None = None
    sent_bytes: float = 0.0  # bytes of the larger of a collective's operand and result
    group_size: int = 1  # number of devices that exchange data
    is_async: bool = False
    # Operations that overlap with this asynchronous collective; None: its end was not found.
    beside: tuple["Operation", ...] | None = None


class Program:
    """A compiled program, parsed from the text that `hlo.compile_and_read` returns.

    `kernel_costs` are functions as `planning/kernel_costs.py` describes them. Their operands and
    results are `Array`s; their name is the call's target or, on TPU, the name of the kernel. They
    receive `used` and `matrix_unit`; `used` also scales what a ragged all-to-all sends.
    """

    def __init__(self, text, kernel_costs=KERNEL_COSTS, used=1.0, matrix_unit=128):
        """Parses the text that `hlo.compile_and_read` returned."""
        self.kernel_costs, self.used, self.matrix_unit = kernel_costs, used, matrix_unit
        header = text.partition("\n")[0]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
        self.n_devices = math.prod(map(int, counts))
        self.computations, self.entry = parse(text)

    @cached_property
    def operations(self):
        """All `Operation`s of one run of the program."""
        return self._walk(self.computations[self.entry], 1.0)

    def _called(self, i, *keys):
        """Returns `{name: Instruction}` of the computation that an attribute names, or {}."""
        name = i.called(*keys)
        return self.computations[name] if name else {}

    def _fused(self, i):
        return self._called(i, "calls") if i.opcode == "fusion" else {}

    def _walk(self, instructions, times):
        found, started, hides = [], {}, set()
        for i in instructions.values():
            if i.opcode.endswith("-done"):
                if (k := started.get(i.operands[0])) is not None:
                    # An operation overlaps with one collective only: collectives share the links.
                    beside = [n for n in range(k + 1, len(found)) if n not in hides]
                    hides.update(beside)
                    found[k] = replace(found[k], beside=tuple(found[n] for n in beside))
                continue
            if i.opcode == "async-update":
                started[i.name] = started.get(i.operands[0])
            if i.opcode in _FREE or i.target in _FREE_KERNELS:
                continue
            if i.opcode == "fusion-start":  # its arrays are operands, results and a context
                n = sum(len(instructions[name].arrays) for name in i.operands)
                i = replace(i, opcode="fusion", arrays=i.arrays[n:-1])
            if i.opcode == "while":
                if n_trips := self._trips(i):
                    found += self._walk(self._called(i, "body"), times * n_trips)
            elif i.opcode == "conditional":
                branches = [self._walk(self.computations[name], times) for name in _branches(i)]
                found += max(branches, key=_work)
            elif i.opcode in ("call", "async-start") or self._runs_on_sparse_cores(i):
                called = self._called(i, "to_apply", "calls", "called_computations")
                inner = self._walk(called, times)
                is_async = i.opcode == "async-start"
                if is_async and inner:
                    started[i.name] = len(found)
                found += [replace(o, is_async=is_async or o.is_async) for o in inner]
            else:
                if i.collective:
                    started[i.name] = len(found)
                found.append(self._operation(i, instructions, times))
                found += self._collectives_of_fusion(i, times)
        return found

    def _runs_on_sparse_cores(self, i):
        # A custom call may run a collective or a gather on SparseCores.
        inside = self._called(i, "called_computations").values()
        runs_there = any(x.collective or x.opcode == "async-start" for x in inside)
        return i.opcode == "custom-call" and runs_there

    def _operation(self, i, known, times):
        cycles = i.attribute(r'"estimated_cycles":"?(\d{1,18})\b')  # unknown ones are 2^64 - 1
        op_name = i.op_name
        if not op_name and i.opcode == "fusion":
            op_name = _root(self._fused(i)).op_name
        flops = self._flops(i, known)
        costs = self._traffic(i, known), flops, flops, float(cycles) if cycles else None
        operation = Operation(i.name, i.target or i.opcode, op_name, times, *costs)
        if i.opcode == "custom-call" and (cost := self._kernel_cost(i, known)):
            flops, traffic, occupied = cost
            return replace(operation, flops=flops, hbm_bytes=traffic, occupied_flops=occupied)
        return self._as_collective(operation, i, known) if i.collective else operation

    def _kernel_cost(self, i, known):
        operands = [a for name in i.operands for a in known[name].arrays]
        is_named = i.target != "tpu_custom_call"  # all kernels for TPU have this target
        name = i.target if is_named else re.sub(r"[.\d]+$", "", i.name)
        about = {"used": self.used, "matrix_unit": self.matrix_unit}
        costs = (cost(name, operands, i.arrays, **about) for cost in self.kernel_costs)
        return next((cost for cost in costs if cost), None)

    def _as_collective(self, operation, i, known):
        is_async = i.opcode.endswith("-start")
        operand_bytes = sum(a.bytes for name in i.operands for a in known[name].arrays)
        result_bytes = sum(a.bytes for a in i.arrays)
        if i.collective == "ragged-all-to-all":  # sends the used rows of its first operand
            operand_bytes, result_bytes = self.used * known[i.operands[0]].arrays[0].bytes, 0.0
        elif is_async and i.is_tuple:  # the result includes the operands
            result_bytes -= operand_bytes
        return replace(
            operation,
            hbm_bytes=0.0,  # a collective costs network time only
            collective=i.collective,
            sent_bytes=max(operand_bytes, result_bytes),
            group_size=self._group_size(i),
            is_async=is_async,
        )

    def _collectives_of_fusion(self, i, times):
        # A fusion may start a collective, or be a reduce-scatter made of an all-reduce and a slice.
        # A collective with a `chain_id` is counted only in the fusion that starts it.
        inside, found = self._fused(i), []
        is_async = any(x.target == "AsyncCollectiveStart" for x in inside.values())
        for x in inside.values():
            if x.collective and (is_async or "chain_id" not in x.attributes):
                op = Operation(x.name, x.opcode, x.op_name, times)
                op = replace(self._as_collective(op, x, inside), is_async=is_async)
                if i.called("calls").startswith("all-reduce-scatter"):
                    op = replace(op, collective="reduce-scatter")
                found.append(op)
        return found

    def _group_size(self, i):
        if i.collective == "collective-permute":
            return math.inf  # so 1 - 1 / size is 1: a device receives all bytes that another sends
        if sizes := i.attribute(r"replica_groups=\[([\d,]+)\]"):  # [groups, devices per group]
            return int(sizes.split(",")[-1])
        if group := i.attribute(r"replica_groups=\{\{([\d,]+)\}"):
            return len(group.split(","))
        if mesh := i.attribute(r"replica_groups=mesh(\[[^{]*\{[^}]*\})"):
            axes = re.findall(r"'(\w+)'", mesh.split("{")[1])
            return math.prod(int(re.search(rf"'{axis}'=(\d+)", mesh).group(1)) for axis in axes)
        if "replica_groups={}" in i.attributes:
            return self.n_devices
        raise ValueError(f"collective {i.name} names its devices in an unknown way: {i.attributes}")

    def _trips(self, loop):
        """Returns the trip count of a loop; 0 if it is not stated."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self._called(loop, "condition")
        for i in condition.values():
            inside = self._fused(i).values() or [i]
            counts_up = any("direction=LT" in x.attributes for x in inside)
            for limit in (condition[name] for name in i.operands) if counts_up else ():
                if limit.opcode == "constant" and re.fullmatch(r"-?\d+", limit.literal):
                    return int(limit.literal)
        return 0

    def _traffic(self, i, known):
        if i.opcode == "copy-start":
            return known[i.operands[0]].hbm_bytes + i.arrays[0].hbm_bytes  # arrays[0]: destination
        if i.opcode in ("slice-start", "dynamic-slice-start"):
            return sum(a.bytes for a in i.arrays if not a.in_hbm and a.dims)
        stated = i.attribute(r'"bytes_accessed":"(\d+)"')
        if i.opcode == "custom-call" and stated and int(stated):
            return float(stated)
        reads = sum(
            self._read(i, k, known[name].hbm_bytes)
            for k, name in enumerate(i.operands)
            if name in known and name not in i.operands[:k]
        )
        return reads + self._written(i, known)

    def _read(self, user, index, whole):
        """Returns the bytes `user` reads from operand `index`, which has `whole` bytes in HBM."""
        if not whole:
            return 0.0
        if user.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
            return min(whole, sum(a.bytes for a in user.arrays))
        if user.opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return 0.0
        if user.opcode in ("bitcast", "tuple") or user.collective or user.target in _ASYNC:
            return 0.0
        inside = self._fused(user)
        if not inside:
            return whole
        parameters = (i for i in inside.values() if i.opcode == "parameter")
        parameter = next(i for i in parameters if int(i.literal) == index)
        return min(whole, self._read_inside(inside, parameter.name, whole))

    def _read_inside(self, inside, name, whole):
        """Returns the bytes that the operations in a fusion read from the parameter `name`."""
        total = 0.0
        for user in inside.values():
            for k, operand in enumerate(user.operands):
                if operand == name and user.opcode == "bitcast":
                    total += self._read_inside(inside, user.name, whole)
                elif operand == name:
                    total += self._read(user, k, whole)
        return total

    def _written(self, i, known):
        inside = self._fused(i)
        if not inside:
            return min(i.hbm_bytes, self._written_by(i, known, i.hbm_bytes))
        root = _root(inside)
        parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(i.arrays):
            return i.hbm_bytes
        return sum(
            min(array.hbm_bytes, self._written_by(part, inside, array.hbm_bytes))
            for part, array in zip(parts, i.arrays, strict=True)
        )

    def _written_by(self, part, inside, whole):
        """Returns the bytes of `whole` that `part` writes, such as the changed elements."""
        while part.opcode == "bitcast" and part.operands[0] in inside:
            part = inside[part.operands[0]]
        if part.opcode == "parameter" or part.collective or part.target in _ASYNC:
            return 0.0
        if part.opcode == "dynamic-update-slice":
            return inside[part.operands[1]].arrays[0].bytes
        if part.opcode == "scatter":
            return 2 * inside[part.operands[-1]].arrays[0].bytes
        if part.opcode == "fusion" and not part.is_tuple:
            fused = self._fused(part)
            return self._written_by(_root(fused), fused, whole)
        return whole

    def _flops(self, i, known):
        if i.opcode == "dot":
            lhs = known[i.operands[0]].arrays[0]
            contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            depth = math.prod(lhs.dims[int(k)] for k in contracted.split(",") if k)
            return 2.0 * depth * math.prod(i.arrays[0].dims)
        if i.opcode == "convolution":
            return _convolution_flops(i, known)
        if i.opcode == "custom-call":
            return float(i.attribute(r'"flops":"(\d+)"') or 0)
        inside = self._fused(i)
        return sum((self._flops(x, inside) for x in inside.values()), 0.0)


def seconds(operation, chip, shape=(), estimate="likely"):
    """Returns the seconds of one execution of an operation by one of `ESTIMATES`.

    A collective takes the time of a ring algorithm over the links of its group, minus the time of
    the operations that overlap with it; if these are unknown, it is assumed to take no time. Other
    operations take the larger of the times for FLOPs and for memory traffic. "peaks": at the peaks
    of `chip`. "cycles": by the compiler's cycles if it has any, else at the peaks. "likely": by
    cycles only if `_BY_CYCLES` has the operation, else by memory traffic at the peak and by FLOPs
    at `chip.kernel_share` of the peak. `shape` is the result of `hardware.slice_shape`.
    """
    if operation.collective:
        if operation.collective == "collective-permute":  # to a neighbour, over one link
            network = operation.sent_bytes * chip.n_links / chip.link_bandwidth
        else:
            rounds = 2 if operation.collective == "all-reduce" else 1
            received = rounds * operation.sent_bytes * (1 - 1 / operation.group_size)
            network = received / chip.group_bandwidth(shape, operation.group_size)
        if not operation.is_async:
            return network
        if operation.beside is None:
            return 0.0
        work = [o for o in operation.beside if not o.collective]
        hidden = sum(o.times * seconds(o, chip, shape, estimate) for o in work) / operation.times
        return max(0.0, network - hidden)
    is_by_cycles = {"peaks": False, "likely": operation.opcode in _BY_CYCLES, "cycles": True}
    if is_by_cycles[estimate] and operation.cycles is not None and chip.clock:
        return operation.cycles / chip.clock
    flops = chip.flops * (chip.kernel_share if estimate == "likely" else 1)
    return max(operation.occupied_flops / flops, operation.hbm_bytes / chip.hbm_bandwidth)


def scope(operation):
    """Returns the scope of an operation: one of `SCOPES`, or "network", "copies" or "other"."""
    if operation.collective:
        return "network"
    for part in reversed(operation.op_name.split("/")):
        name = part.removeprefix("transpose(").removeprefix("jvp(").rstrip(")")
        if name in SCOPES:
            return name
    return "copies" if "copy" in operation.opcode else "other"


def _root(instructions):
    return next(i for i in instructions.values() if i.is_root)


def _work(operations):
    flops = sum(o.times * o.flops for o in operations)
    return flops, sum(o.times * o.hbm_bytes for o in operations)


def _branches(conditional):
    listed = conditional.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return [name.strip().lstrip("%") for name in listed.split(",")]
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def _convolution_flops(i, known):
    # On TPU, matrix products become convolutions. Products with padding are not counted.
    lhs, rhs = (known[name].arrays[0].dims for name in i.operands[:2])
    out, labels = i.arrays[0].dims, i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if not labels:
        return 0.0
    of_lhs, of_rhs, of_out = re.split("_|->", labels)
    window = dict(entry.split("=") for entry in (i.attribute(r"window=\{([^}]*)\}") or "").split())
    products = 1
    for axis in range(len(of_lhs) - 2):
        label = str(axis)

        def setting(name, default):
            return int(window[name].split("x")[axis].split("_")[0]) if name in window else default

        sizes = lhs[of_lhs.index(label)], rhs[of_rhs.index(label)], out[of_out.index(label)]
        names = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
        products *= _valid_products(*sizes, *(setting(*item) for item in names.items()))
    n_groups = int(i.attribute(r"batch_group_count=(\d+)") or 1)
    batch = out[of_out.index("b")] if n_groups == 1 else lhs[of_lhs.index("b")] / n_groups
    return 2.0 * products * rhs[of_rhs.index("i")] * out[of_out.index("f")] * batch


def _valid_products(n_in, n_kernel, n_out, stride, padding, in_dilation, kernel_dilation):
    """Counts pairs (output, kernel position) along one axis that read input, not padding."""
    positions = np.arange(n_out)[:, None] * stride + np.arange(n_kernel) * kernel_dilation - padding
    inside = (positions >= 0) & (positions <= (n_in - 1) * in_dilation)
    return int((inside & (positions % in_dilation == 0)).sum())
