"""Optimised HLO text as values: a module of computations of instructions.

`compiled.as_text()` is the one form in which every backend of XLA shows the program that it will
run. This module reads its syntax and nothing else; what the instructions mean is read elsewhere.
Grammar: https://openxla.org/xla/operation_semantics and the text printer of `HloInstruction`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from autoshard.errors import XlaError

__all__ = ["Computation", "HloModule", "Instruction", "Shape", "itemsize", "parse_hlo"]

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The shape ends at the first bracket that a blank, a word and an opening bracket follow.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][\w\-]*)\((.*)$")
_OPERANDS_END = re.compile(r"\)(?=,|$)")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One array: its element type as HLO names it, and its dimensions."""

    dtype: str
    dimensions: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dimensions)

    @property
    def n_bytes(self) -> int:
        """The bytes of the array without padding; sub-byte types are rounded up."""
        return math.ceil(self.n_elements * itemsize(self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique within the module.
        opcode: `all-reduce`, `fusion`, `add` and so on.
        shapes: the arrays of the result, a tuple's flattened.
        operands: names of the operands.
        attributes: what follows the operands, as text.
        literal: what stands between the brackets, as text (the value of a constant).
        is_root: whether this is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that this instruction calls, in the order of the text."""
        names: list[str] = []
        for match in _CALLED.finditer(self.attributes):
            names += [match[1]] if match[1] else re.findall(r"[\w.\-]+", match[2])
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The one-word value of the attribute `name`, without its `%`, or None."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The JAX name stack that XLA carries along, or an empty text."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def channel(self) -> int | None:
        """The channel of a collective."""
        match = _CHANNEL.search(self.attributes)
        return int(match[1]) if match else None

    @property
    def estimated_cycles(self) -> int:
        """Cycles as the TPU compiler estimates them; 0 where it says nothing."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else 0

    @property
    def known_trip_count(self) -> int | None:
        """How often XLA says that this loop runs."""
        match = _TRIPS.search(self.attributes)
        return int(match[1]) if match else None


@dataclass(frozen=True, kw_only=True)
class Computation:
    """A computation: its instructions in the order of the text (the schedule, once scheduled)."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Instruction name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Instruction name -> the instructions that read it."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return {name: tuple(found) for name, found in users.items()}

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def parameter(self, index: int) -> Instruction | None:
        """The parameter of that number, or None."""
        return next(
            (i for i in self.instructions if i.opcode == "parameter" and i.literal == str(index)),
            None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HloModule:
    """A module: its computations by name, and the name of the one where it starts."""

    computations: Mapping[str, Computation]
    entry_name: str

    @property
    def entry(self) -> Computation:
        """The computation where the program starts."""
        return self.computations[self.entry_name]

    def __iter__(self) -> Iterator[Computation]:
        return iter(self.computations.values())


def itemsize(dtype: str) -> float:
    """Bytes of one element of an HLO type; 0 for tokens and opaque values.

    >>> itemsize("bf16"), itemsize("pred"), itemsize("s4"), itemsize("f8e4m3fn")
    (2.0, 1.0, 0.5, 1.0)
    """
    if dtype == "pred":
        return 1.0
    match = re.match(r"(?:bf|[suf]|c)(\d+)", dtype)
    return int(match[1]) / 8 if match else 0.0


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        # A bounded dynamic dimension prints as <=8: its bound is what is allocated.
        Shape(dtype=dtype, dimensions=tuple(int(d) for d in re.findall(r"\d+", dimensions)))
        for dtype, dimensions in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    is_root, name, shape, opcode, rest = match.groups()
    end = _OPERANDS_END.search(rest)
    literal, attributes = (rest[: end.start()], rest[end.end() :]) if end else (rest, "")
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=_shapes(shape),
        operands=() if opcode in ("constant", "parameter") else tuple(_NAME.findall(literal)),
        attributes=attributes,
        literal=literal,
        is_root=is_root is not None,
    )


def parse_hlo(text: str) -> HloModule:
    """Read the text of an HLO module.

    Raises:
        XlaError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry_name = ""
    name, instructions = "", list[Instruction]()
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, instructions = header[2], []
            entry_name = name if header[1] else entry_name
        elif line.startswith("}") and name:
            computations[name] = Computation(name=name, instructions=tuple(instructions))
            name = ""
        elif name and (instruction := _instruction(line)):
            instructions.append(instruction)
    if not entry_name:
        raise XlaError("the compiler's text has no entry computation; this is no HLO module")
    return HloModule(computations=computations, entry_name=entry_name)
