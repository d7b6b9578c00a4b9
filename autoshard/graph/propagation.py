"""Spreads the layouts of the arguments through a program, as XLA's partitioner does.

A simulation of Shardy's propagation (https://openxla.org/shardy/propagation) on groups of arrays:
the layout of every argument is fixed; through each op, a factor split in one array is split in the
others. Ops go by priority, each level run until nothing changes:

0. ops that only move data (what grouping left of them);
1. all ops, but only factors that pass through, and from the large side of a broadcast to the small;
2. all ops, reduced factors too;
3. also from the small side of a broadcast to the large.

Where two factors of an op want one mesh axis, the factor of the larger array wins, then that of
the earlier one.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from autoshard.graph.program import WHOLE, Array, Layout, Op, Program

__all__ = ["propagate", "splits_evenly"]

_LEVELS = 4


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
    """Lay out every group.

    Args:
        program: the step.
        fixed: group -> layout, for the groups of arguments.
        axis_sizes: devices along each mesh axis.

    Returns:
        One layout a group; a group that nothing reaches is whole on every device.
    """
    whole = (WHOLE,) * len(axis_sizes)
    state = [list(fixed.get(group, whole)) for group in range(len(program.groups))]
    if not axis_sizes:
        return tuple(tuple(layout) for layout in state)
    touching: list[list[int]] = [[] for _ in program.groups]
    for index, op in enumerate(program.ops):
        for array in (*op.operands, *op.results):
            touching[array.group].append(index)
    sizes = [group.sizes for group in program.groups]
    for level in range(_LEVELS):
        queue = deque(i for i, op in enumerate(program.ops) if _may(op, level))
        waiting = set(queue)
        while queue:
            index = queue.popleft()
            waiting.discard(index)
            for group in _spread(program.ops[index], level, state, fixed, sizes, axis_sizes):
                for other in touching[group]:
                    if other not in waiting and _may(program.ops[other], level):
                        waiting.add(other)
                        queue.append(other)
    return tuple(tuple(layout) for layout in state)


def _may(op: Op, level: int) -> bool:
    return op.kind != "unknown" and (level > 0 or op.kind in ("elementwise", "reshape"))


def _spread(
    op: Op,
    level: int,
    state: list[list[int]],
    fixed: Mapping[int, Layout],
    sizes: Sequence[tuple[int, ...]],
    axis_sizes: Sequence[int],
) -> list[int]:
    """Spread the layouts through one op; return the groups that changed."""
    wanted = _wanted(op, level, state)
    if not wanted:
        return []
    targets: tuple[Array, ...] = (*op.operands, *op.results)
    if op.kind == "broadcast" and level < _LEVELS - 1:
        targets = op.operands
    changed = []
    for array in targets:
        if array.group in fixed:
            continue
        layout = state[array.group]
        for factor, axes in wanted:
            if factor not in array.factors:
                continue
            dim = array.factors.index(factor)
            for axis in axes:
                if layout[axis] != WHOLE:
                    continue
                layout[axis] = dim
                if splits_evenly(sizes[array.group], tuple(layout), axis_sizes):
                    changed.append(array.group)
                else:
                    layout[axis] = WHOLE
    return changed


def _wanted(op: Op, level: int, state: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """The factors to split and over which axes, the strongest first."""
    sources: tuple[Array, ...] = (*op.operands, *op.results)
    if op.kind == "broadcast" and level < _LEVELS - 1:
        sources = op.results
    masks: dict[int, list[tuple[int, int, int]]] = {}
    for position, array in enumerate(sources):
        layout = state[array.group]
        for dim, factor in enumerate(array.factors):
            if factor is None or (level < 2 and factor in op.reduced):
                continue
            mask = sum(1 << axis for axis, split in enumerate(layout) if split == dim)
            if mask:
                masks.setdefault(factor, []).append((mask, array.n_bytes, position))
    wanted = []
    for factor, found in masks.items():
        union = 0
        for mask, _, _ in found:
            union |= mask
        # Arrays that split a factor in ways that are not nested pull in two directions: XLA
        # follows neither.
        holders = [(-n_bytes, position) for mask, n_bytes, position in found if mask == union]
        if holders:
            axes = [axis for axis in range(union.bit_length()) if union >> axis & 1]
            wanted.append((min(holders), factor, axes))
    return [(factor, axes) for _, factor, axes in sorted(wanted)]
