"""Whether a program adds up copies: sums of convolutions that XLA's partitioner makes too large.

Where it splits the rows that a convolution's gradient sums over, or the batch of a grouped
convolution's, over some of the devices, the others hold copies; but it sums over all devices
(`convolution_handler.cc` in XLA gives its all-reduce no groups). The gradient is then too large by
the number of copies, in programs for CPUs and for TPUs, and nothing tells.

Found by following through the program which devices hold equal values: each value has a label a
device, and devices of one label hold the same for sure. An all-reduce that stems from a convolution
is wrong if members of one of its groups have one label. What is not understood has as many labels
as devices, so that it raises no alarm.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from autoshard.xla.groups import Groups, parse_groups, parse_pairs, parse_tiles
from autoshard.xla.hlo import Computation, HloModule, Instruction
from autoshard.xla.names import layer_of

__all__ = ["SumOfCopies", "complaint", "sums_of_copies"]

_CONVOLUTION = "conv_general_dilated"
_CALLS = {"fusion", "call", "async-start"}
# What may differ from device to device whatever it reads, or is not followed.
_UNKNOWN = {"conditional", "rng", "rng-get-and-update-state", "infeed", "recv"}
_ARITHMETIC: Mapping[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: int(a / b) if b else 0,
    "remainder": lambda a, b: a - b * int(a / b) if b else a,
    "minimum": min,
    "maximum": max,
    "clamp": lambda least, number, most: min(max(number, least), most),
}
_MOVES = {"bitcast", "convert", "copy", "copy-done", "copy-start", "reshape"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOfCopies:
    """A sum that is too large.

    Attributes:
        layer: the layer whose gradient it is.
        times: by how much.
    """

    layer: str
    times: float


@dataclass(frozen=True, slots=True)
class _Held:
    """An array as the devices hold it.

    Attributes:
        labels: one a device; devices of one label hold the same.
        numbers: of a single integer that is known: what it is on each device.
        table: of a constant list of integers: what is in it.
    """

    labels: tuple[int, ...]
    numbers: tuple[int, ...] | None = None
    table: tuple[int, ...] | None = None


def complaint(sums: Sequence[SumOfCopies]) -> str:
    """What is wrong with a program that has such sums, in one sentence."""
    worst = max(sums, key=lambda each: each.times)
    layer = worst.layer or "a convolution"
    others = f" (and {len(sums) - 1} more)" if len(sums) > 1 else ""
    return (
        f"XLA's partitioner adds up copies: the gradient of {layer}{others} comes out "
        f"{worst.times:g} times too large; where data alone is split it does not"
    )


# One array, or those of a tuple.
_Value = tuple[_Held, ...]


def sums_of_copies(
    module: HloModule, n_devices: int, layers: Mapping[str, str]
) -> tuple[SumOfCopies, ...]:
    """The sums of convolutions that count copies, each layer once, the worst of its sums.

    Args:
        module: the partitioned program.
        n_devices: of the mesh.
        layers: as for `autoshard.xla.names.layer_of`.
    """
    found: dict[str, float] = {}
    if any(_CONVOLUTION in one.op_name for each in module for one in each.instructions):
        reader = _Reader(module, n_devices)
        reader.run(module.entry, None)
        for op_name, times in reader.found:
            layer = layer_of(op_name, layers)
            found[layer] = max(times, found.get(layer, times))
    return tuple(SumOfCopies(layer=layer, times=times) for layer, times in found.items())


class _Reader:
    """Follows a program; `found`: op name and factor of each sum that counts copies."""

    def __init__(self, module: HloModule, n_devices: int) -> None:
        self._module = module
        self._n = n_devices
        self._same = _Held((0,) * n_devices)
        self._apart = _Held(tuple(range(n_devices)))
        self.found: list[tuple[str, float]] = []

    def run(self, computation: Computation, arguments: Sequence[_Value] | None) -> _Value:
        """The value of a computation; those of the entry's parameters are read from shardings."""
        values: dict[str, _Value] = {}
        for one in computation.instructions:
            if one.opcode == "parameter" and arguments is not None:
                index = int(one.literal)
                value = arguments[index] if index < len(arguments) else (self._apart,)
            else:
                value = self._value(one, computation, values)
            values[one.name] = value
        return values[computation.root.name]

    def _value(
        self, one: Instruction, computation: Computation, values: Mapping[str, _Value]
    ) -> _Value:
        operands = [values.get(name, (self._apart,)) for name in one.operands]
        whole = [self._joined(operand) for operand in operands]
        match one.opcode:
            case "parameter":
                tiles = parse_tiles(one.attributes, self._n)
                return (self._apart if tiles is None else _Held(_canonical(tiles)),)
            case "partition-id":
                return (_Held(self._apart.labels, tuple(range(self._n))),)
            case "constant":
                return (self._constant(one),)
            case "tuple":
                return tuple(whole)
            case "get-tuple-element":
                index = int(one.attribute("index") or 0)
                (value,) = operands
                return (value[index],) if index < len(value) else (whole[0],)
            case "dynamic-slice" if (picked := _picked(one, whole)) is not None:
                return (picked,)
            case opcode if opcode in _CALLS and one.called:
                called = self._module.computations.get(one.called[0])
                return self.run(called, operands) if called else (self._apart,)
            case "while":
                return self._looped(one, operands[0])
            case opcode if opcode in _UNKNOWN:
                return (self._apart,)
        name = one.opcode.removesuffix("-start")
        if name in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
            return self._collective(name, one, computation, whole)
        if name == "collective-permute":
            return (self._permuted(one, self._joined(whole)),)
        return (self._computed(one, whole),)

    def _looped(self, one: Instruction, state: _Value) -> _Value:
        """What a loop leaves: what differs between devices before any of its turns."""
        body = self._module.computations.get(one.attribute("body") or "")
        if body is None:
            return (self._apart,)
        found = list(self.found)
        while True:
            self.found = list(found)  # only the last turn knows all that may differ
            after = self.run(body, [state])
            if len(after) != len(state):
                return (self._apart,)
            joined = tuple(_join(*pair) for pair in zip(state, after, strict=True))
            if joined == state:
                return joined
            state = joined

    def _constant(self, one: Instruction) -> _Held:
        if re.fullmatch(r"-?\d+", one.literal):
            return _Held(self._same.labels, numbers=(int(one.literal),) * self._n)
        if re.fullmatch(r"\{-?\d+(?:, -?\d+)*\}", one.literal):
            table = tuple(int(number) for number in re.findall(r"-?\d+", one.literal))
            return _Held(self._same.labels, table=table)
        return self._same

    def _computed(self, one: Instruction, whole: Sequence[_Held]) -> _Held:
        """The result of an op that each device runs on what it holds."""
        if one.opcode in _MOVES and len(whole) == 1:
            return whole[0]
        known = [held.numbers for held in whole if held.numbers is not None]
        is_scalar = len(one.shapes) == 1 and one.shapes[0].n_elements == 1
        if one.opcode in _ARITHMETIC and len(known) == len(whole) and is_scalar:
            made = tuple(map(_ARITHMETIC[one.opcode], *known))
            return _Held(_canonical(made), made)
        return _Held(self._joined(whole).labels)

    def _collective(
        self, name: str, one: Instruction, computation: Computation, whole: Sequence[_Held]
    ) -> _Value:
        groups = parse_groups(one.attributes, self._n)
        if name in ("all-reduce", "reduce-scatter"):
            for held, names in zip(whole, _op_names(one, computation), strict=True):
                self._check(held, groups, names)
        if name == "all-to-all" or one.opcode != name:  # results of several at once
            whole = [self._joined(whole)]
        shared = name in ("all-reduce", "all-gather")
        return tuple(self._gathered(held, groups, shared) for held in whole)

    def _gathered(self, held: _Held, groups: Groups, shared: bool) -> _Held:
        """What members of a group make of what all of them hold; shared: the same."""
        seen: list[object] = list(range(self._n))
        for group in groups:
            members = tuple(held.labels[device] for device in group)
            for place, device in enumerate(group):
                seen[device] = members if shared else (members, place)
        return _Held(_canonical(seen))

    def _check(self, held: _Held, groups: Groups, op_names: Iterable[str]) -> None:
        """Note a sum of what a convolution made if members of a group hold copies."""
        op_name = next((name for name in op_names if _CONVOLUTION in name), None)
        if op_name is None:
            return
        times = max(len(group) / len({held.labels[device] for device in group}) for group in groups)
        if times > 1:
            self.found.append((op_name, times))

    def _permuted(self, one: Instruction, held: _Held) -> _Held:
        seen: list[object] = [None] * self._n
        for source, target in parse_pairs(one.attributes):
            seen[target] = held.labels[source]
        return _Held(_canonical(seen))

    def _joined(self, value: Sequence[_Held]) -> _Held:
        """What differs where any of several arrays does."""
        if len(value) == 1:
            return value[0]
        return reduce(_join, value, self._same)


def _op_names(one: Instruction, computation: Computation) -> Iterator[list[str]]:
    """Of each array that a collective sums, what its name stack may be.

    XLA sums several at once; then those who take the sums apart have their names.
    """
    users = computation.users.get(one.name, ())
    for index, operand in enumerate(one.operands):
        made = computation.by_name.get(operand)
        taken = [user for user in users if user.attribute("index") == str(index)]
        shown = [one] if len(one.operands) == 1 else []
        yield [each.op_name for each in (*shown, *([made] if made else []), *taken)]


def _picked(one: Instruction, whole: Sequence[_Held]) -> _Held | None:
    """What each device takes from a table of integers, as the place where its shard begins."""
    if len(whole) != 2 or one.shapes[0].n_elements != 1:
        return None
    table, places = whole[0].table, whole[1].numbers
    if table is None or places is None:
        return None
    taken = tuple(table[min(max(place, 0), len(table) - 1)] for place in places)
    return _Held(_canonical(taken), numbers=taken)


def _join(first: _Held, second: _Held) -> _Held:
    if first == second:
        return first
    if first.labels == second.labels:
        return _Held(first.labels)
    return _Held(_canonical(list(zip(first.labels, second.labels, strict=True))))


def _canonical(labels: Sequence[object]) -> tuple[int, ...]:
    """Labels numbered in the order in which they appear."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)
