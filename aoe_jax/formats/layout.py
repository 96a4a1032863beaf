"""How the tensors of files store a parameter: their names, and the order of their axes.

`architectures.py` has the tables; their rows are explained there.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """A row of a table: one way to store a parameter."""

    name: str  # of its tensors, with {L} and {n} where layers and experts have their own
    stored: tuple[str, ...] = ()  # the axes of a tensor; (): the parameter's own


class Layout:
    """The tensors of a row for a parameter of known shape."""

    def __init__(self, row: Row, axes: str, shape: tuple[int, ...]):
        """Takes the row, the parameter's declared axes, and its shape with the axis of layers.

        The first declared axes may be missing: a dense layer has no axis of experts.
        """
        axes, layers = axes.split(), ["L"] if "{L}" in row.name else []
        axes = layers + axes[len(layers) + len(axes) - len(shape) :]
        self._name, self.sizes = row.name, dict(zip(axes, shape, strict=True))
        self._named = [axis for axis in axes if f"{{{axis}}}" in row.name]
        self._axes = axes[len(self._named) :]
        # For each axis of a tensor, the parameter's axes in it, and which half of it they are.
        self._groups = [([axis], None) for axis in self._axes]
        if row.stored:
            groups = [group.partition("/") for group in row.stored]
            self._groups = [(list(axes), int(half) if half else None) for axes, _, half in groups]
        self._order = [axis for group, _ in self._groups for axis in group]
        self.shape = tuple(
            self._size(group) * (1 if half is None else 2) for group, half in self._groups
        )  # of a tensor

    @property
    def first(self):
        """The name of the first tensor."""
        return next(self.tensors())[0]

    def _size(self, axes):
        return math.prod(self.sizes[axis] for axis in axes)

    def tensors(self, bounds: dict[str, tuple[int, int]] | None = None) -> Iterator[tuple]:
        """Yields `(name, index)` of the tensors that store a part of the parameter.

        Args:
          bounds: `(first, end)` of the part by axis; None: all of it. Axes in it may be missing.

        Yields:
          The name of a tensor, and the index of its numbers in the part.
        """
        bounds = {axis: (0, self.sizes[axis]) for axis in self._named} | (bounds or {})
        for numbers in itertools.product(*(range(*bounds[axis]) for axis in self._named)):
            name = self._name.format(**dict(zip(self._named, numbers, strict=True)))
            pairs = zip(self._named, numbers, strict=True)
            yield name, tuple(number - bounds[axis][0] for axis, number in pairs)

    def slices(self, bounds: dict[str, tuple[int, int]]):
        """The slices of a tensor that hold a part of the parameter."""
        slices = []
        for (outer, *inner), half in self._groups:
            offset, unit = (half or 0) * self.sizes[outer], self._size(inner)
            slices.append(slice(*(unit * (offset + bound) for bound in bounds[outer])))
        return slices

    def from_file(self, tensor: np.ndarray, bounds: dict[str, tuple[int, int]]):
        """The part of the parameter between `bounds`, from the `slices` of a tensor.

        Raises:
          ValueError: of axes that are flattened into one, another than the first is split.
        """
        split = tensor.reshape([bounds[axis][1] - bounds[axis][0] for axis in self._order])
        return split.transpose([self._order.index(axis) for axis in self._axes])

    def to_file(self, part: np.ndarray):
        """A whole tensor, from its part of the parameter."""
        return part.transpose([self._axes.index(axis) for axis in self._order]).reshape(self.shape)
