"""Joins arrays that are always laid out together into groups.

The partitioner first spreads layouts through elementwise ops, casts, transpositions and reshapes
that move no data, and only then through anything else
(https://openxla.org/shardy/propagation, "op priorities"). So two arrays joined by such an op,
dimension for dimension, end with one layout, and we decide it once. An argument with a spec of its
own is joined with others of that spec alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoshard.graph.equations import ArrayType, Equation, FlatJaxpr
from autoshard.graph.link import PASSING, Label
from autoshard.graph.program import Repetition

__all__ = ["Grouping", "Numbering", "group_arrays"]

_JOINING = (*PASSING, "broadcast")


class Grouping:
    """Which group each array belongs to, and which of the group's dimensions each of its own is.

    Args:
        arrays: every array of the step.
        owners: array identity -> name of the spec it must follow, for arguments.
    """

    def __init__(self, arrays: tuple[ArrayType, ...], owners: Mapping[int, str]) -> None:
        self.group_of = list(range(len(arrays)))
        self.sizes: list[tuple[int, ...]] = []
        self.dims: list[tuple[int | None, ...]] = []
        self.owner: list[str | None] = [owners.get(i) for i in range(len(arrays))]
        self._members = [[i] for i in range(len(arrays))]
        for array in arrays:
            kept = [dim for dim, size in enumerate(array.shape) if size != 1]
            place = {dim: i for i, dim in enumerate(kept)}
            self.dims.append(tuple(place.get(dim) for dim in range(len(array.shape))))
            self.sizes.append(tuple(array.shape[dim] for dim in kept))

    def join(self, a: int, b: int, pairs: Mapping[int, int]) -> bool:
        """Put arrays `a` and `b` in one group; `pairs` maps dimensions of `b` to those of `a`.

        Returns:
            Whether they are together afterwards, dimension for dimension.
        """
        mapping = {self.dims[b][y]: self.dims[a][x] for y, x in pairs.items()}
        ga, gb = self.group_of[a], self.group_of[b]
        if ga == gb:
            return all(x == y for y, x in mapping.items())
        if self.owner[ga] != self.owner[gb]:
            return False
        if len(self._members[ga]) < len(self._members[gb]):
            ga, gb = gb, ga
            mapping = {x: y for y, x in mapping.items()}
        for member in self._members[gb]:
            self.group_of[member] = ga
            self.dims[member] = tuple(None if d is None else mapping[d] for d in self.dims[member])
        self._members[ga] += self._members[gb]
        self._members[gb] = []
        return True

    def placed(self, identity: int, labels: tuple[Label | None, ...]) -> tuple[Label | None, ...]:
        """Reorder the labels of an array's dimensions to the order of its group's dimensions."""
        placed: list[Label | None] = [None] * len(self.sizes[self.group_of[identity]])
        for dim, label in zip(self.dims[identity], labels, strict=True):
            if dim is not None:
                placed[dim] = label
        return tuple(placed)


@dataclass(slots=True)
class Numbering:
    """Gives the groups in use numbers from 0.

    Attributes:
        grouping: the groups.
        held: identities of the arrays that are there before any op.
        repetitions: identity of an array -> how it repeats another.
        numbers: index of a group in `grouping` -> its number.
    """

    grouping: Grouping
    held: frozenset[int]
    repetitions: Mapping[int, Repetition]
    numbers: dict[int, int] = field(default_factory=dict)

    def number(self, identity: int) -> int:
        """The number of an array's group, the next one where it has none yet."""
        root = self.grouping.group_of[identity]
        return self.numbers.setdefault(root, len(self.numbers))

    def repetition(self, identity: int) -> Repetition | None:
        """How an array repeats another, by the dimensions of its group."""
        found = self.repetitions.get(identity)
        if found is None:
            return None
        dims = self.grouping.dims[identity]
        dim, width = dims[found.dim], dims[found.width]
        return None if dim is None or width is None else replace(found, dim=dim, width=width)


def group_arrays(
    flat: FlatJaxpr, owners: Mapping[int, str]
) -> tuple[Grouping, dict[int, tuple[int, ...]]]:
    """Group the arrays of a step.

    Returns:
        The grouping, and the equations that are left, by position: each with the operands (by
        position) that are not in the group of its result already.
    """
    grouping = Grouping(flat.arrays, owners)
    left = {}
    for position, equation in enumerate(flat.equations):
        open_operands = tuple(
            i
            for i, identity in enumerate(equation.operands)
            if any(size != 1 for size in flat.arrays[identity].shape)
        )
        if equation.link.kind in _JOINING and len(equation.results) == 1:
            open_operands = tuple(
                i for i in open_operands if not _joined(grouping, flat, equation, i)
            )
        if open_operands:
            left[position] = open_operands
    return grouping, left


def _joined(grouping: Grouping, flat: FlatJaxpr, equation: Equation, position: int) -> bool:
    """Join one operand with the result where each dimension of one is a dimension of the other."""
    operand, result = equation.operands[position], equation.results[0]
    before = _labelled(flat.arrays[operand].shape, equation.link.operands[position])
    after = _labelled(flat.arrays[result].shape, equation.link.results[0])
    if before is None or after is None or before.keys() != after.keys():
        return False
    shapes = flat.arrays[operand].shape, flat.arrays[result].shape
    if any(shapes[0][before[label]] != shapes[1][after[label]] for label in before):
        return False
    return grouping.join(result, operand, {before[label]: after[label] for label in before})


def _labelled(shape: tuple[int, ...], labels: tuple[Label | None, ...]) -> dict[Label, int] | None:
    """Label -> dimension; None where a dimension of more than one element has no label."""
    found: dict[Label, int] = {}
    for dim, (size, label) in enumerate(zip(shape, labels, strict=True)):
        if size != 1:
            if label is None:
                return None
            found[label] = dim
    return found
