"""How the parameters of a layer lie in the tensors of a file: names, axes in another order or in
one, halves of a tensor.

Axes are letters, those of one tensor in a row: V vocabulary, d model width, H heads of queries, K
of keys and values, h width of a head, n experts, f width of an expert, s its routing neurons. `(H
h) d` has the axes H and h in one, H outermost.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

# The axes of each parameter of the decoder; those under `layers` have the axis of layers before
# these, a dense layer's no n.
PARAMETERS = {
    "embed/embedding": "V d",
    "output/embedding": "V d",
    "output_bias": "V",
    "final_norm/scale": "d",
    "final_norm/bias": "d",
    "layers/attention_norm/scale": "d",
    "layers/attention_norm/bias": "d",
    "layers/attention/q": "d H h",
    "layers/attention/k": "d K h",
    "layers/attention/v": "d K h",
    "layers/attention/o": "H h d",
    "layers/attention/q_bias": "H h",
    "layers/attention/k_bias": "K h",
    "layers/attention/v_bias": "K h",
    "layers/attention/o_bias": "d",
    "layers/attention/q_norm": "H h",
    "layers/attention/k_norm": "K h",
    "layers/experts_norm/scale": "d",
    "layers/experts_norm/bias": "d",
    "layers/experts/w_router": "d n",
    "layers/experts/w_router_hidden": "d h",
    "layers/experts/pooled_scale": "d",
    "layers/experts/pooled_bias": "d",
    "layers/experts/router_scale": "d",
    "layers/experts/expert_bias": "n",
    "layers/experts/w_down": "n d r",
    "layers/experts/w_up": "n r f",
    "layers/experts/w_g": "n d f",
    "layers/experts/w_p": "n d f",
    "layers/experts/w_o": "n f d",
    "layers/experts/w_g_route": "n d s",
    "layers/experts/w_p_route": "n d s",
    "layers/experts/w_o_route": "n s d",
    "layers/experts/firing_threshold": "n",
    "layers/experts/score_bias": "n",
}

# What selection methods have beside parameters, float32 in every model.
ROUTING_STATE = {
    "layers/selection_bias": "n",
    "layers/threshold": "n",
    "layers/updates": "",
    "layers/live": "n",
    "layers/fired": "n",
    "layers/unclaimed": "d",
    "layers/multiplier": "",
}


def is_layered(path: str):
    """Whether a parameter is one of the layers, so that its first axis is that of layers."""
    return path.startswith("layers/")


def parameter_path(key_path):
    """The path of a parameter in its tree in words, such as `layers/attention/q`."""
    return "/".join(key.key for key in key_path)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file that holds a parameter, or its part of one layer, or of one expert."""

    name: str  # with {layer} and {expert} where there are several
    axes: str | None = None  # as the file has them; None: as the parameter
    half: int | None = (
        None  # its axis f holds two parameters, one after the other: this is the first (0) or second (1)
    )

    @property
    def by_expert(self):
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name


@dataclass(frozen=True)
class Place:
    """Where one parameter of one layer lies: the tensor, and the parameter's sizes by letter in the
    parameter's order.
    """

    tensor: Tensor
    sizes: dict[str, int]

    @classmethod
    def of(cls, path: str, tensor: Tensor, shape: tuple[int, ...]):
        """Of a parameter with this shape, the axis of layers left out."""
        return cls(
            tensor,
            dict(
                zip((PARAMETERS | ROUTING_STATE)[path].split()[-len(shape) :], shape, strict=True)
            ),
        )

    @property
    def of_experts(self):
        """Whether the parameter has a matrix for each expert."""
        return next(iter(self.sizes), None) == "n" and len(self.sizes) > 1

    @property
    def experts(self):
        """The numbers of the experts, or (None,) where they share a tensor."""
        return range(self.sizes["n"]) if self.tensor.by_expert else (None,)

    def name(self, layer, expert=None):
        """The name of the tensor of a layer (None: of a parameter that has no layers) and expert."""
        return self.tensor.name.format(layer=layer, expert=expert)

    @property
    def _letters(self):
        """The axes of the parameter that one tensor holds."""
        return [letter for letter in self.sizes if letter != "n" or not self.tensor.by_expert]

    @property
    def _groups(self):
        """The axes of the tensor, each a list of the parameter's."""
        if self.tensor.axes is None:
            return [[letter] for letter in self._letters]
        return [
            group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", self.tensor.axes)
        ]

    @property
    def shape(self):
        """Of the tensor."""
        return tuple(
            self._size(group) * (1 if self._half_of(group) is None else 2) for group in self._groups
        )

    def _size(self, group):
        return math.prod(self.sizes[letter] for letter in group)

    def _half_of(self, group):
        return self.tensor.half if group == ["f"] else None

    def slices(self, bounds: dict[str, tuple[int, int]]):
        """The part of the tensor with the part of the parameter between `bounds`, `(first, end)` by
        letter.

        Raises:
          ValueError: it is no block of the tensor.
        """
        slices = []
        for group in self._groups:
            outer, *inner = group
            if any(bounds[letter] != (0, self.sizes[letter]) for letter in inner):
                raise ValueError(f"{self.tensor.name}: of axes {group} only the first can be split")
            offset, unit = (self._half_of(group) or 0) * self.sizes[outer], self._size(inner)
            slices.append(slice(*(unit * (offset + bound) for bound in bounds[outer])))
        return slices

    def from_file(self, tensor: np.ndarray, bounds: dict[str, tuple[int, int]]):
        """The part of the parameter between `bounds`, from that part of the tensor."""
        order = [letter for group in self._groups for letter in group]
        split = tensor.reshape([bounds[letter][1] - bounds[letter][0] for letter in order])
        return split.transpose([order.index(letter) for letter in self._letters])

    def to_file(self, parameter: np.ndarray):
        """The whole tensor from the whole parameter that it holds."""
        order = [letter for group in self._groups for letter in group]
        return parameter.transpose([self._letters.index(letter) for letter in order]).reshape(
            self.shape
        )
