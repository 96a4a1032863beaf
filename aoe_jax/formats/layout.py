"""How the tensors of files store a parameter: their names, and the order of their axes."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from aoe_jax.formats.tensor_files import Stored


class Layout:
    """The tensors of a row of a table in `architectures.py`, for a parameter of known shape.

    `sizes` has the parameter's sizes by axis, L for layers, and `shape` is that of a tensor.
    """

    def __init__(self, axes: str, shape: tuple[int, ...], name: str, stored: str = ""):
        """Takes the parameter's declared axes, its shape with the axis of layers, and the row.

        The first declared axes may be missing: a dense layer has no axis of experts.
        """
        axes, layers = axes.split(), ["L"] if "{L}" in name else []
        axes = layers + axes[len(layers) + len(axes) - len(shape) :]
        self._name, self.sizes = name, dict(zip(axes, shape, strict=True))
        self._named = [axis for axis in axes if f"{{{axis}}}" in name]
        self._axes = axes[len(self._named) :]
        # For each axis of a tensor, the parameter's axes in it, and which half of it they are.
        self._groups = [([axis], None) for axis in self._axes]
        if stored:
            groups = [group.partition("/") for group in stored.split()]
            self._groups = [(list(axes), int(half) if half else None) for axes, _, half in groups]
        self._order = [axis for group, _ in self._groups for axis in group]
        self.shape = tuple(
            self._size(group) * (1 if half is None else 2) for group, half in self._groups
        )

    @property
    def first(self):
        """The name of the first tensor."""
        return next(self.tensors())[0]

    def _size(self, axes):
        return math.prod(self.sizes[axis] for axis in axes)

    def tensors(self, bounds: dict | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the tensors that store a part of the parameter, and their index in the part.

        `bounds` has `(first, end)` of the part by axis; all of an axis that it lacks.
        """
        bounds = {axis: (0, size) for axis, size in self.sizes.items()} | (bounds or {})
        for numbers in itertools.product(*(range(*bounds[axis]) for axis in self._named)):
            at = dict(zip(self._named, numbers, strict=True))
            yield self._name.format(**at), tuple(at[axis] - bounds[axis][0] for axis in at)

    def read(self, tensor: Stored, bounds: dict[str, tuple[int, int]]) -> np.ndarray:
        """What a tensor holds of the part of the parameter between `bounds`."""
        slices = []
        for (outer, *inner), half in self._groups:
            offset, unit = (half or 0) * self.sizes[outer], self._size(inner)
            slices.append(slice(*(unit * (offset + bound) for bound in bounds[outer])))
        sizes = [bounds[axis][1] - bounds[axis][0] for axis in self._order]
        part = tensor.read(slices).reshape(sizes)
        return part.transpose([self._order.index(axis) for axis in self._axes])

    def to_file(self, part: np.ndarray):
        """A whole tensor, from its part of the parameter."""
        return part.transpose([self._axes.index(axis) for axis in self._order]).reshape(self.shape)
