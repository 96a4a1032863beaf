"""How a tensor of a file stores a parameter: its name, and the order of its axes.

`architectures.py` has the tables; their rows are explained there.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

LAYER = "model.layers.{layer}."  # the prefix of every tensor that belongs to a layer


def is_layered(path: str):
    """Whether a parameter belongs to the layers, so that its first axis counts layers."""
    return path.startswith("layers/")


def parameter_path(key_path):
    """The path of a parameter in its tree as a string, such as `layers/attention/q`."""
    return "/".join(key.key for key in key_path)


@dataclass(frozen=True)
class Tensor:
    """A row of a table: a tensor that stores a parameter, or its part of one layer or expert."""

    name: str  # with {layer} and {expert} where there are several
    axes: tuple[str, ...]  # the parameter's axes, without that of layers
    stored: tuple[str, ...] | None  # the tensor's axes; None: in the parameter's order

    @property
    def by_expert(self):
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name


def parse_table(text: str) -> dict[str, tuple[Tensor, ...]]:
    """The rows of a table by the path of the parameter; several rows of a path are alternatives."""
    tensors = {}
    for line in text.strip().splitlines():
        path, axes, name, *stored = re.split(r"\s{2,}", line.strip())
        tensor = Tensor(
            (LAYER if is_layered(path) else "") + name,
            tuple(re.findall(r"\w", axes)),
            tuple(re.findall(r"\([^)]*\)|\w(?:/\d)?", stored[0])) if stored else None,
        )
        tensors[path] = (*tensors.get(path, ()), tensor)
    return tensors


class Layout:
    """The layout of a parameter of known shape in the tensors of a row."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...]):
        """Takes the row and the parameter's shape, without the axis of layers.

        The leading axes of the row may be missing: a dense layer has no axis of experts.
        """
        axes = tensor.axes[len(tensor.axes) - len(shape) :]
        self.tensor = tensor
        self.sizes = dict(zip(axes, shape, strict=True))
        self.of_experts = axes[:1] == ("n",) and len(axes) > 1
        self._axes = [axis for axis in axes if axis != "n" or not tensor.by_expert]
        groups = self._axes if tensor.stored is None else tensor.stored
        self._groups = [re.findall(r"[A-Za-z]", group) for group in groups]
        halves = [re.search(r"\d", group) for group in groups]
        self._halves = [None if half is None else int(half[0]) for half in halves]
        self._order = [axis for group in self._groups for axis in group]

    @property
    def experts(self):
        """The numbers of the experts, or (None,) where one tensor holds all of them."""
        return range(self.sizes["n"]) if self.tensor.by_expert else (None,)

    def name(self, layer, expert=None):
        """The name of the tensor; layer is None for a parameter outside the layers."""
        return self.tensor.name.format(layer=layer, expert=expert)

    @property
    def shape(self):
        """The shape of the tensor."""
        return tuple(
            self._size(group) * (1 if half is None else 2)
            for group, half in zip(self._groups, self._halves, strict=True)
        )

    def _size(self, group):
        return math.prod(self.sizes[axis] for axis in group)

    def slices(self, bounds: dict[str, tuple[int, int]]):
        """The slices of the tensor that hold a part of the parameter.

        Args:
          bounds: `(first, end)` of the part by axis.

        Raises:
          ValueError: the part is no block of the tensor.
        """
        slices = []
        for group, half in zip(self._groups, self._halves, strict=True):
            outer, *inner = group
            if any(bounds[axis] != (0, self.sizes[axis]) for axis in inner):
                raise ValueError(f"{self.tensor.name}: of axes {group} only the first can be split")
            offset, unit = (half or 0) * self.sizes[outer], self._size(inner)
            slices.append(slice(*(unit * (offset + bound) for bound in bounds[outer])))
        return slices

    def from_file(self, tensor: np.ndarray, bounds: dict[str, tuple[int, int]]):
        """The part of the parameter between `bounds`, from the `slices` of the tensor."""
        split = tensor.reshape([bounds[axis][1] - bounds[axis][0] for axis in self._order])
        return split.transpose([self._order.index(axis) for axis in self._axes])

    def to_file(self, parameter: np.ndarray):
        """The whole tensor from the parameter, or from the part of the tensor's expert."""
        transposed = parameter.transpose([self._axes.index(axis) for axis in self._order])
        return transposed.reshape(self.shape)
