"""Plans several meshes for a configuration and the devices of a topology, to find the fastest."""

import itertools
import logging
import math
from dataclasses import replace

from aoe_jax.errors import UserError
from aoe_jax.planning.hardware import count_parts
from aoe_jax.planning.step_plan import plan
from aoe_jax.sharding import fill_mesh

log = logging.getLogger(__name__)

_FSDP = 16  # weights are split over all devices, or over this many
_EXPERT, _TENSOR = (2, 4, 8, 16, 32), (2, 4)  # sizes of an axis; the other one is then 1


def layouts(config, n_devices, n_parts=1):
    """The configurations with the meshes that make sense, as `fill_mesh` returns them.

    `fsdp` has all devices that `expert` or `tensor` leaves, or 16 of them; `data` has the rest. A
    mesh that the configuration does not allow is left out. `n_parts` is the number of slices.
    """
    found = []
    axes = [(1, 1), *((n, 1) for n in _EXPERT), *((1, n) for n in _TENSOR)]
    for (expert, tensor), widest in itertools.product(axes, (n_devices, _FSDP)):
        fsdp = min(n_devices // (n_parts * expert * tensor), widest)
        transport = config.mesh.transport if expert > 1 else "ring"
        try:
            axes_of_mesh = {"data": -1, "fsdp": fsdp, "expert": expert, "tensor": tensor}
            mesh = replace(config.mesh, **axes_of_mesh, transport=transport)
            filled = fill_mesh(replace(config, mesh=mesh), n_devices)
            filled.mesh.check_parts(n_parts)
        except UserError as e:
            log.info(f"left out: {e}")
            continue
        if filled not in found:
            found.append(filled)
    return found


def plan_layouts(config, generation, devices):
    """Returns the plans of `layouts`, fastest first; those that do not fit are last. Raises
    `UserError` if there is no layout.
    """
    candidates, reports = layouts(config, len(devices), count_parts(devices)), []
    for number, candidate in enumerate(candidates, 1):
        log.info(f"layout {number} of {len(candidates)}: {_axes(vars(candidate.mesh))}")
        try:
            reports.append(plan(candidate, generation, devices))
        except UserError as e:
            log.info(f"left out: {e}")
    if not reports:
        raise UserError("--layouts: the configuration allows none of the meshes; see above")
    return sorted(reports, key=lambda r: (not r["fits"], r["likely_step_seconds"] or math.inf))


def line(report):
    """Formats a plan as a line of text."""
    memory = f"{report['memory_bytes']['total'] / 1e9:6.2f} GB"
    start = f"{_axes(report['mesh'])}: {memory}{'' if report['fits'] else ', does not fit'}"
    if report["likely_step_seconds"] is None:
        return f"{start}, time unknown"
    parts = [f"{name} {1e3 * s:.0f}" for name, s in [*report["seconds_by_scope"].items()][:5]]
    times = f"{report['seconds_at_peaks']:.3f} to {report['seconds_by_cycles']:.3f}"
    likely = f"likely {report['likely_step_seconds']:.3f} s (at the peaks, by cycles: {times})"
    return f"{start}, {likely}; in ms: {', '.join(parts)}"


def _axes(mesh):
    return "data {data:3}, fsdp {fsdp:3}, expert {expert:2}, tensor {tensor}".format(**mesh)
