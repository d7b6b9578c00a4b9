"""How XLA's partitioner splits a matmul, given the layouts of its operands and of its result.

It matches and does not count what else it might do. Over one mesh axis, in this order:

- a batch factor that both operands are split by, or one of them and the result;
- the contracted factor that both are split by: partial sums, to be reduced;
- rows that the left operand and the result are split by, or columns of the right one and the
  result: the other operand is gathered;
- where the result is whole and one operand too, the contracted factor of the other, if that has
  more elements than the result;
- what the result is split by; else nothing, and each device does everything.

Over several axes it takes first those that one kind of factor matches over, and decides for the
rest within the groups of devices that this leaves. Of several kinds it takes the one whose largest
matmul or collective is smallest, then the one that moves less.

Devices that an array leaves idle are used in two ways. A gathered operand is first cut into as many
shards as there are idle devices, and permuted there, where their number divides by that of the
matched axes. So is a sum that the result splits over the axes that it is summed over: all-reduced
in slices, which are then permuted into place.

Written after XLA's `dot_handler.cc`; held against its programs in `tests/test_cost_partitioner.py`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autoshard.cost.shards import Choice
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.splits import splits_evenly

__all__ = ["Partition", "partition_matmul"]

_Split = Mapping[int, int]
"""The factor that each axis splits, of those axes that split one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How a matmul is done.

    Attributes:
        choice: the factor split over each axis, or `WHOLE`.
        permuted: position of an operand -> the layout that it is permuted to first.
        n_slices: how many slices of its sums are all-reduced apart; 1 where none are.
        within: for each axis those that were decided on before, in whose groups it is decided on.
    """

    choice: Choice
    within: tuple[frozenset[int], ...] = ()
    permuted: Mapping[int, Layout] = field(default_factory=dict)
    n_slices: int = 1

    def within_of(self, axis: int) -> frozenset[int]:
        """In the groups of which axes what moves over this one does so."""
        return self.within[axis] if axis < len(self.within) else frozenset()


def partition_matmul(
    op: Op, layouts: Sequence[Layout], axis_sizes: Sequence[int]
) -> Partition | None:
    """Decide as XLA does; None where that would cut a factor into unequal shards.

    Args:
        op: a contraction of two operands.
        layouts: of the left operand, the right one and the result.
        axis_sizes: devices along each axis.
    """
    matmul = _Matmul(op=op, axis_sizes=axis_sizes)
    splits = tuple(
        {
            axis: factor
            for axis, dim in enumerate(layout)
            if dim != WHOLE and (factor := array.factors[dim]) is not None
        }
        for array, layout in zip(matmul.arrays, layouts, strict=True)
    )
    found = matmul.decide(_Groups(axes=frozenset(range(len(axis_sizes))), splits=splits, done={}))
    axes = range(len(axis_sizes))
    choice = tuple(found.choice.get(axis, WHOLE) for axis in axes)
    if not splits_evenly(op.factor_sizes, choice, axis_sizes):
        return None
    return Partition(
        choice=choice,
        within=tuple(found.within[axis] for axis in axes),
        permuted={
            position: tuple(
                matmul.arrays[position].factors.index(split[axis]) if axis in split else WHOLE
                for axis in axes
            )
            for position, split in found.permuted.items()
        },
        n_slices=found.n_slices,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """What is left to decide within groups of devices.

    Attributes:
        axes: the axes within a group.
        splits: of the left operand, the right one and the result.
        done: what was chosen over the other axes.
    """

    axes: frozenset[int]
    splits: tuple[_Split, ...]
    done: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """See `Partition`."""

    choice: Mapping[int, int]
    within: Mapping[int, frozenset[int]]
    permuted: Mapping[int, _Split] = field(default_factory=dict)
    n_slices: int = 1


@dataclass(frozen=True, kw_only=True)
class _Matmul:
    op: Op
    axis_sizes: Sequence[int]

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return self.op.arrays

    @cached_property
    def kinds(self) -> Mapping[int, str]:
        """Factor -> `batch`, `rows`, `columns` or `contracted`."""
        names = {
            (True, True, True): "batch",
            (True, False, True): "rows",
            (False, True, True): "columns",
            (True, True, False): "contracted",
        }
        where = {
            factor: tuple(factor in array.factors for array in self.arrays)
            for factor in range(len(self.op.factor_sizes))
        }
        return {factor: names[key] for factor, key in where.items() if key in names}

    def decide(self, left_over: _Groups) -> _Found:
        """The choice over the axes that are left."""
        if not left_over.axes:
            return _Found(choice={}, within={})
        within = dict.fromkeys(left_over.axes, frozenset(left_over.done))
        matched = self._matched(left_over)
        if matched is not None:
            return _Found(choice=matched, within=within)
        # At first only where the devices need not be grouped anew.
        for strict in (True, False):
            groups = (
                self._batch(left_over, strict),
                self._free(left_over, strict),
                self._contracted(left_over, strict),
            )
            found = [self._grouped(left_over, group) for group in groups if group]
            if found:
                return min(found, key=lambda one: self._cost(left_over, one.choice))
        return _Found(choice=left_over.splits[2], within=within)

    def _matched(self, left_over: _Groups) -> _Split | None:
        """What fits over all axes at once, where each array is split over all of them or none."""
        left, right, result = left_over.splits
        if any(split and set(split) != left_over.axes for split in left_over.splits):
            return None

        def fully(split: _Split, kind: str) -> bool:
            return bool(split) and all(self.kinds.get(f) == kind for f in split.values())

        if fully(left, "batch") and left in (right, result):
            return left
        if fully(right, "batch") and right == result:
            return right
        if fully(left, "contracted") and fully(right, "contracted"):
            return left if self.arrays[0].n_bytes >= self.arrays[1].n_bytes else right
        if fully(left, "rows") and left == result or fully(right, "columns") and right == result:
            return result
        for position, (split, other) in enumerate(((left, right), (right, left))):
            is_alone = fully(split, "contracted") and not other and not result
            if is_alone and self._is_more(position, left_over):
                return split
        return None

    def _is_more(self, position: int, left_over: _Groups) -> bool:
        """Whether an operand has more elements than the result, within a group."""
        operand, result = (
            math.prod(self.op.factor_sizes[f] for f in array.factors if f is not None)
            / self._parts(a for a, f in left_over.done.items() if f in array.factors)
            for array in (self.arrays[position], self.arrays[2])
        )
        return operand > result

    def _batch(self, left_over: _Groups, strict: bool) -> dict[int, int]:
        """The batch factors that an operand and the result are split by."""
        result = self._of_kind(left_over.splits[2], "batch")
        for split in left_over.splits[:2]:
            own = self._of_kind(split, "batch")
            if result and (own == result or self._as_many(own, result, strict)):
                return result
        return {}

    def _free(self, left_over: _Groups, strict: bool) -> dict[int, int]:
        """The rows or the columns that an operand and the result are split by.

        Of both those that leave the smaller operand to be gathered.
        """
        found, partial = {}, {}
        for position, kind in enumerate(("rows", "columns")):
            own = self._of_kind(left_over.splits[position], kind)
            result = self._of_kind(left_over.splits[2], kind)
            if own and (own == result or self._as_many(own, result, strict)):
                found[position] = result
            partial[position] = _common(own, result)
        if len(found) == 2:
            left, right = (
                self._parts(found[1 - position])
                * self._local_bytes(position, {**left_over.splits[position], **left_over.done})
                for position in (0, 1)
            )
            return found[0] if right < left else found[1]
        return next(iter(found.values()), None) or partial[0] or partial[1]

    def _contracted(self, left_over: _Groups, strict: bool) -> dict[int, int]:
        """The contracted factors that both operands are split by."""
        left, right = (self._of_kind(split, "contracted") for split in left_over.splits[:2])
        if left and self._as_many(left, right, strict):
            return left if self.arrays[0].n_bytes > self.arrays[1].n_bytes else right
        return _common(left, right)

    def _grouped(self, left_over: _Groups, group: dict[int, int]) -> _Found:
        """Take a group, and decide within it."""
        splits: list[_Split] = []
        permuted: dict[int, _Split] = {}
        n_slices = 1
        for position, split in enumerate(left_over.splits):
            inside = {axis: factor for axis, factor in split.items() if axis not in group}
            moved = {split[axis] for axis in group if axis in split} - set(group.values())
            idle = left_over.axes - set(split)
            if moved & set(inside.values()):
                finer = position == 2 and self._is_finer(split, group, splits)
                inside = dict(splits[0] or splits[1]) if finer else {}
            elif moved and idle and self._parts(idle) % self._parts(group) == 0:
                is_foreign = not set(group.values()) & set(self.arrays[position].factors)
                if is_foreign and position == 2:
                    n_slices = self._parts(group)
                elif is_foreign and len(moved) == 1:
                    inside |= dict.fromkeys(idle, *moved)
                    permuted[position] = inside
            splits.append(inside)
        found = self.decide(
            _Groups(
                axes=left_over.axes - set(group),
                splits=tuple(splits),
                done={**left_over.done, **group},
            )
        )
        return replace(
            found,
            choice={**group, **found.choice},
            within={**dict.fromkeys(group, frozenset(left_over.done)), **found.within},
            permuted={**found.permuted, **permuted},
            n_slices=max(n_slices, found.n_slices),
        )

    def _is_finer(self, result: _Split, group: _Split, operands: Sequence[_Split]) -> bool:
        """Whether the result is split as one operand is, the other being whole, and further."""
        (own, *others) = [split for split in operands if split] or [{}]
        within = own.items() <= result.items() and max(own, default=0) < min(group)
        return bool(own) and not others and within

    def _cost(self, left_over: _Groups, part: Mapping[int, int]) -> tuple[float, float]:
        """Bytes of the largest matmul or collective, and all bytes that collectives make."""
        choice = {**left_over.done, **part}
        sizes = [self._local_bytes(position, choice) for position in range(3)]
        largest, moved = sum(sizes), 0.0
        for position, array in enumerate(self.arrays):
            size = sizes[position]
            for axis in left_over.axes:
                factor = choice.get(axis, WHOLE)
                made = factor if factor in array.factors else WHOLE
                given = left_over.splits[position].get(axis, WHOLE)
                source, target = (made, given) if position == 2 else (given, made)
                if position == 2 and self.kinds.get(factor) == "contracted":
                    largest, moved = max(largest, size), moved + 2 * size
                elif source in (target, WHOLE):
                    continue
                elif target == WHOLE:
                    whole = size * (self.axis_sizes[axis] if position == 2 else 1)
                    largest = max(largest, whole + whole / self.axis_sizes[axis])
                    moved += whole
                else:
                    largest, moved = max(largest, 2 * size), moved + size
        return largest, moved

    def _of_kind(self, split: _Split, kind: str) -> dict[int, int]:
        return {axis: factor for axis, factor in split.items() if self.kinds.get(factor) == kind}

    def _parts(self, axes: Iterable[int]) -> int:
        return math.prod(self.axis_sizes[axis] for axis in axes)

    def _as_many(self, one: _Split, other: _Split, strict: bool) -> bool:
        """Whether they cut into as many parts, along whatever axes, where that is good enough."""
        return not strict and self._parts(one) == self._parts(other)

    def _local_bytes(self, position: int, split: _Split) -> float:
        array = self.arrays[position]
        return array.n_bytes / self._parts(a for a, f in split.items() if f in array.factors)


def _common(one: _Split, other: _Split) -> dict[int, int]:
    """The factors that the same axes split in both."""
    axes = {
        factor: [{a for a, f in split.items() if f == factor} for split in (one, other)]
        for factor in one.values()
    }
    return {axis: factor for axis, factor in one.items() if axes[factor][0] == axes[factor][1]}
