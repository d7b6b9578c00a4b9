"""Spreads the layouts of the arguments through a program, as XLA's partitioner does.

A simulation of Shardy's propagation (https://openxla.org/shardy/propagation) on groups of arrays:
the layout of every argument is fixed; through each op, a factor split in one array is split in the
others. Ops go by priority, each level run until nothing changes:

0. ops that only move data (what grouping left of them);
1. all ops, but only factors that pass through, and from the large side of a broadcast to the small;
2. all ops, factors too that are summed, shifted or gathered;
3. also from the small side of a broadcast to the large.

Where two factors of an op want one mesh axis, the factor of the larger array wins, then that of
the earlier one.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from autoshard.graph.program import WHOLE, Array, Layout, Op, Program

__all__ = ["Propagator", "propagate", "splits_evenly"]

_LEVELS = 4

_Changes = tuple[tuple[int, Layout], ...]


def splits_evenly(sizes: Sequence[int], layout: Layout, axis_sizes: Sequence[int]) -> bool:
    """Whether each dimension is a multiple of the product of the mesh axes that split it."""
    left = list(sizes)
    for dim, n in zip(layout, axis_sizes, strict=True):
        if dim != WHOLE:
            if left[dim] % n:
                return False
            left[dim] //= n
    return True


def propagate(
    program: Program, fixed: Mapping[int, Layout], axis_sizes: Sequence[int]
) -> tuple[Layout, ...]:
    """Lay out every group, once; see `Propagator`."""
    return Propagator(program, axis_sizes).propagate(fixed)


class Propagator:
    """Propagates many layouts through one program.

    What one op makes of the layouts around it is remembered, and ops that look alike (those of
    different blocks do) share it, so that further layouts cost a table lookup an op.

    Args:
        program: the step.
        axis_sizes: devices along each mesh axis.
    """

    def __init__(self, program: Program, axis_sizes: Sequence[int]) -> None:
        self._program = program
        self._axis_sizes = tuple(axis_sizes)
        self._touching: list[list[int]] = [[] for _ in program.groups]
        looks: dict[tuple[object, ...], int] = {}
        self._look_of: list[int] = []
        self._groups_of: list[tuple[int, ...]] = []
        for index, op in enumerate(program.ops):
            groups = tuple(array.group for array in (*op.operands, *op.results))
            self._groups_of.append(groups)
            for group in set(groups):
                self._touching[group].append(index)
            self._look_of.append(looks.setdefault(_look(op, program), len(looks)))
        self._levels = [[_may(op, level) for op in program.ops] for level in range(_LEVELS)]
        self._starts = [
            [index for index, op in enumerate(program.ops) if _begins(op, level)]
            for level in range(_LEVELS)
        ]
        # By level and look: the layouts around an op -> what it changes.
        self._spreads: list[list[dict[tuple[Layout, ...], _Changes]]] = [
            [{} for _ in looks] for _ in range(_LEVELS)
        ]

    def propagate(self, fixed: Mapping[int, Layout]) -> tuple[Layout, ...]:
        """Lay out every group.

        Args:
            fixed: group -> layout, for the groups of arguments and of constrained outputs.

        Returns:
            One layout a group; a group that nothing reaches is whole on every device.
        """
        whole = (WHOLE,) * len(self._axis_sizes)
        state = [fixed.get(group, whole) for group in range(len(self._program.groups))]
        if not self._axis_sizes:
            return tuple(state)
        for level, may in enumerate(self._levels):
            spreads = self._spreads[level]
            queue = deque(self._starts[level])
            waiting = set(queue)
            while queue:
                index = queue.popleft()
                waiting.discard(index)
                groups = self._groups_of[index]
                around = tuple([state[group] for group in groups])
                changes = spreads[self._look_of[index]].get(around)
                if changes is None:
                    changes = self._spread(index, level, around)
                for at, layout in changes:
                    group = groups[at]
                    if group in fixed:
                        continue
                    state[group] = layout
                    for other in self._touching[group]:
                        if may[other] and other not in waiting:
                            waiting.add(other)
                            queue.append(other)
        return tuple(state)

    def _spread(self, index: int, level: int, around: tuple[Layout, ...]) -> _Changes:
        """What one op changes: positions among its arrays, and their new layouts."""
        op = self._program.ops[index]
        sizes = [self._program.groups[group].sizes for group in self._groups_of[index]]
        changes = tuple(_spread(op, level, around, sizes, self._axis_sizes))
        self._spreads[level][self._look_of[index]][around] = changes
        return changes


def _look(op: Op, program: Program) -> tuple[object, ...]:
    """All that decides how an op spreads layouts."""
    arrays = (*op.operands, *op.results)
    groups = [array.group for array in arrays]
    return (
        op.kind,
        len(op.operands),
        _late(op),
        tuple(
            (array.factors, array.n_bytes, program.groups[array.group].sizes) for array in arrays
        ),
        tuple(groups.index(group) for group in groups),
    )


def _late(op: Op) -> frozenset[int]:
    """The factors that do not just pass through."""
    return op.reduced | op.shifted | op.gathered


def _may(op: Op, level: int) -> bool:
    return op.kind != "unknown" and (level > 0 or op.kind in ("elementwise", "reshape"))


def _begins(op: Op, level: int) -> bool:
    """Whether an op may do at a level what it did not at the one before."""
    newly = (op.kind in ("elementwise", "reshape"), True, bool(_late(op)), op.kind == "broadcast")
    return _may(op, level) and newly[level]


def _spread(
    op: Op,
    level: int,
    around: Sequence[Layout],
    sizes: Sequence[tuple[int, ...]],
    axis_sizes: Sequence[int],
) -> list[tuple[int, Layout]]:
    """Spread the layouts through one op; return the arrays, by position, that changed."""
    arrays: tuple[Array, ...] = (*op.operands, *op.results)
    n_operands = len(op.operands)
    wanted = _wanted(op, level, around)
    small_side = op.kind == "broadcast" and level < _LEVELS - 1
    changed = []
    for at in range(n_operands if small_side else len(arrays)):
        layout = list(around[at])
        for factor, axes in wanted:
            if factor not in arrays[at].factors:
                continue
            dim = arrays[at].factors.index(factor)
            for axis in axes:
                if layout[axis] == WHOLE:
                    layout[axis] = dim
                    if not splits_evenly(sizes[at], tuple(layout), axis_sizes):
                        layout[axis] = WHOLE
        if tuple(layout) != around[at]:
            changed.append((at, tuple(layout)))
    return changed


def _wanted(op: Op, level: int, around: Sequence[Layout]) -> list[tuple[int, list[int]]]:
    """The factors to split and over which axes, the strongest first."""
    arrays: tuple[Array, ...] = (*op.operands, *op.results)
    small_side = op.kind == "broadcast" and level < _LEVELS - 1
    late = _late(op)
    masks: dict[int, list[tuple[int, int, int]]] = {}
    for at in range(len(op.operands) if small_side else 0, len(arrays)):
        for dim, factor in enumerate(arrays[at].factors):
            if factor is None or (level < 2 and factor in late):
                continue
            mask = sum(1 << axis for axis, split in enumerate(around[at]) if split == dim)
            if mask:
                masks.setdefault(factor, []).append((mask, arrays[at].n_bytes, at))
    wanted = []
    for factor, found in masks.items():
        union = 0
        for mask, _, _ in found:
            union |= mask
        # Arrays that split a factor in ways that are not nested pull in two directions: XLA
        # follows neither.
        holders = [(-n_bytes, at) for mask, n_bytes, at in found if mask == union]
        if holders:
            axes = [axis for axis in range(union.bit_length()) if union >> axis & 1]
            wanted.append((min(holders), factor, axes))
    return [(factor, axes) for _, factor, axes in sorted(wanted)]
