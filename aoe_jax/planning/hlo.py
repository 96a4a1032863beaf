"""Compiles a program and parses the text of its optimised HLO."""

import math
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other dtypes have the number of bits in their name
_COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "ragged-all-to-all", "reduce-scatter"}
_COLLECTIVES |= {"collective-broadcast", "collective-permute"}


@dataclass(frozen=True)
class Array:
    """An array in the result of an instruction."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # as printed, such as "{1,0:T(8,128)(2,1)S(1)}"

    @property
    def in_hbm(self):
        """Whether the array is in the device's main memory."""
        return "S(" not in self.layout

    @cached_property
    def bytes(self):
        """The size in memory, with the padding of the layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.match(r"[a-z]+(\d+)", self.dtype).group(1))
        dims = list(self.dims)
        if tiled := re.match(r"\{([\d,]+):T\(([\d,]+)\)", self.layout):
            # The last dimensions are padded to multiples of the first tile of the layout.
            minor_to_major, tile = ([int(n) for n in text.split(",")] for text in tiled.groups())
            dims = [1] * (len(tile) - len(dims)) + [dims[i] for i in reversed(minor_to_major)]
            padded = zip(dims[-len(tile) :], tile, strict=True)
            dims[-len(tile) :] = [math.ceil(n / t) * t for n, t in padded]
        return math.prod(dims) * bits / 8

    @property
    def hbm_bytes(self):
        """`bytes` if the array is in main memory, else 0."""
        return self.bytes if self.in_hbm else 0.0


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # arrays of the result
    is_tuple: bool
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses after the opcode
    attributes: str
    is_root: bool

    @property
    def hbm_bytes(self):
        """The bytes of the result in main memory."""
        return sum(a.hbm_bytes for a in self.arrays)

    def called(self, *keys):
        """Returns the name of the computation that one of the attributes `keys` names, or None."""
        return self.attribute(rf"\b(?:{'|'.join(keys)})=\{{?%?([\w.\-]+)")

    def attribute(self, pattern):
        """Searches the attributes for a regular expression; returns its first group, or None."""
        found = re.search(pattern, self.attributes)
        return found and found.group(1)

    @property
    def op_name(self):
        """The path of named scopes and transformations in JAX, which may be empty."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self):
        """The target of a custom call, else None."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def collective(self):
        """The kind of a collective, without `-start`; None for other instructions."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in _COLLECTIVES else None


def compile_and_read(lowered):
    """Returns `(compiled program, text of its HLO)`; the text is None on CPU or after a cache hit.

    The text is the compiler's dump, because `compiled.as_text()` may fail or lack cycles.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        names = ("*.after_codegen.txt", "*.*gpu_after_optimizations.txt")
        files = (file for name in names for file in Path(folder).glob(name))
        return compiled, next((file.read_text() for file in files), None)


def parse(text):
    """Returns `({computation: {name: Instruction}}, name of the entry computation)`."""
    text = re.sub(r"kernel_metadata=\{\n(.*)\n\}", r"kernel_metadata={\1}", text)
    text = re.sub(r"/\*index=\d+\*/", "", text)
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = re.match(r"(ENTRY )?%?([\w.\-]+)\s*(\(.*)?\{\s*$", line)
            current = None
            if header and not line.startswith("HloModule"):
                current = computations[header.group(2)] = []
                entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _parse_instruction(line)):
            current.append(instruction)
    return {name: _with_elements(found) for name, found in computations.items()}, entry


def _with_elements(instructions):
    # An operand may have the short form `%tuple#index`; this adds a `get-tuple-element` for it. The
    # elements of such a tuple are arrays, not tuples.
    known = {}
    for i in instructions:
        for operand in (operand for operand in i.operands if "#" in operand):
            whole, index = operand.split("#")
            arrays = (known[whole].arrays[int(index)],)
            element = operand, "get-tuple-element", arrays, False, (whole,), whole, "", False
            known[operand] = Instruction(*element)
        known[i.name] = i
    return known


def _parse_instruction(line):
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    root, name, rest = found.groups()
    is_tuple = rest.startswith("(")
    end = _end_of_parenthesis(rest, 0) + 1 if is_tuple else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode = re.match(r"[\w\-]+", rest).group()
    end = _end_of_parenthesis(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in re.findall(r"\d+", dims)), layout)
        for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?", shape)
    )
    operands = tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", inside))
    return Instruction(
        name, opcode, arrays, is_tuple, operands, inside.strip(), rest[end + 1 :], bool(root)
    )


def _end_of_parenthesis(text, start):
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis: {text[:80]}")
