"""Splits arrays over the mesh. `RULES` maps logical axes of arrays to these axes of the mesh:

    data    splits batches; the devices at each index along `data` have a copy of the model
    fsdp    splits batches, parameters and optimiser state
    expert  splits batches and experts
    tensor  splits the heads of attention, the width of experts, and positions in all other layers

A single device has the mesh (1, 1, 1, 1). `MeshAxes` maps these axes to those of a user's mesh.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aoe_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")


# Logical axis of an array -> the mesh axes that split it, or None.
RULES = {
    "batch": ("data", "fsdp", "expert"),  # sequences
    "sequence": "tensor",  # positions of activations, except inside attention and experts
    "embed": "fsdp",  # d_model of weights
    "experts": "expert",
    "mlp": "tensor",  # width of experts
    "rank": "fsdp",  # d_low of w_gate_up (w_gate_down is split along d_model, not d_low)
    "heads": "tensor",
    "vocab": None,
}


def target_device():
    """The device to compile for: the `AbstractDevice` of the current mesh, or the first device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def count_slices(devices):
    """The number of TPU slices that the devices belong to; 1 if devices name no slice."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def spec_of(*axes):
    """The `PartitionSpec` of an array with these logical axes of `RULES`; None: not split."""
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


@dataclass(frozen=True)
class MeshAxes:
    """For each of `MESH_AXES`, the name of an axis of the current mesh, several names (outermost
    first), or None. Devices along all other axes of that mesh do the same computation.
    """

    data: str | tuple[str, ...] | None = "data"
    fsdp: str | tuple[str, ...] | None = "fsdp"
    expert: str | tuple[str, ...] | None = "expert"
    tensor: str | tuple[str, ...] | None = "tensor"

    def names(self, axis):
        """The tuple of names for one of `MESH_AXES`."""
        named = getattr(self, axis)
        return (named,) if isinstance(named, str) else named or ()

    def collective(self, axis):
        """The name, or tuple of names, for one of `MESH_AXES`, as an argument of collectives."""
        names = self.names(axis)
        return names[0] if len(names) == 1 else names

    def spec(self, spec):
        """Translates a `PartitionSpec` over `MESH_AXES` to the names of this mesh."""
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
        named = (sum(map(self.names, entry), ()) for entry in entries)
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in named))

    def sizes(self, mesh):
        """The number of devices along each of `MESH_AXES`; 1 without a mesh.

        Raises `ValueError` if the mesh lacks a named axis, or if a name is given twice.
        Inside `jax.shard_map` parameters are not split: all names except `data` must be None.
        """
        if mesh.empty:
            return (1,) * len(MESH_AXES)
        seen = []
        for axis in MESH_AXES:
            given = f"mesh axis {axis}={getattr(self, axis)!r}"
            if mesh.manual_axes and axis != "data" and self.names(axis):
                wanted = "leave it at None inside jax.shard_map, where parameters are whole"
                raise ValueError(f"{given}: {wanted}")
            for name in self.names(axis):
                if name not in mesh.axis_names:
                    raise ValueError(f"{given}: name axes of the mesh, {mesh.axis_names}, or None")
                if name in seen:
                    raise ValueError(f"{given}: {name!r} is already the name of another axis")
                if mesh.manual_axes and name not in mesh.manual_axes:
                    raise ValueError(f"{given}: name axes of jax.shard_map, {mesh.manual_axes}")
                seen.append(name)
        return tuple(math.prod(map(mesh.shape.get, self.names(axis))) for axis in MESH_AXES)


AXES = MeshAxes()


def fill_mesh(config, n_devices):
    """Replaces `mesh.data=-1`. Raises `UserError` unless the mesh has `n_devices` devices."""
    mesh = config.mesh
    inner = mesh.fsdp * mesh.expert * mesh.tensor
    data = n_devices // inner if mesh.data == -1 else mesh.data
    if data * inner != n_devices:
        raise UserError(
            f"config.mesh: data={mesh.data} fsdp={mesh.fsdp} expert={mesh.expert} "
            f"tensor={mesh.tensor}: the product must be the number of devices, {n_devices} "
            "(data=-1 means all remaining devices)"
        )
    return dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))


def make_mesh(config, devices):
    """The mesh of a result of `fill_mesh`. Devices are ordered by their network topology, and
    slices are along `data`. Raises `UserError` if the topology does not allow the shape.
    """
    shape = config.mesh.shape
    n_slices = count_slices(devices)
    config.mesh.check_parts(n_slices)
    split = {"allow_split_physical_axes": True}
    try:
        if n_slices == 1:
            grid = mesh_utils.create_device_mesh(shape, devices, **split)
        else:
            within, across = (shape[0] // n_slices, *shape[1:]), (n_slices, 1, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
    except (NotImplementedError, ValueError, AssertionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"config.mesh: {shape} does not fit these devices: {reason}") from e
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def rows_of_process(sharding, n_rows, process):
    """The sorted indices of the rows of a batch `[n_rows, ...]` on the devices of a process. On a
    TPU slice the rows of a host may not be consecutive, and several hosts may have the same rows.
    """
    rows = set()
    for device, (index, *_) in sharding.devices_indices_map((n_rows, 1)).items():
        if device.process_index == process:
            rows.update(range(n_rows)[index])
    return sorted(rows)


def batch_sharding(mesh):
    """The sharding of an array `[B, S]`: the batch axes split B, and S is not split."""
    return NamedSharding(mesh, spec_of("batch", None))


def replicated(mesh):
    """The sharding of an array of which every device has a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def with_shardings(abstract, shardings):
    """Adds shardings to a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def put_batch(sharding, batch, n_rows=None):
    """Makes a global batch on devices from arrays `{name: array}` of this process. The arrays have
    all rows of the batch. If the batch size `n_rows` is given, they have only `rows_of_process`.
    """
    shapes = {name: (n_rows or len(a), *a.shape[1:]) for name, a in batch.items()}
    with jax.transfer_guard("allow"):  # these transfers are intended
        return jax.make_array_from_process_local_data(sharding, batch, shapes)
