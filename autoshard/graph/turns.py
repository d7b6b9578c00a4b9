"""One op's turn in the propagation: what a split in one of its arrays makes of the others.

Ops have their turns by priority, level by level:

0. ops that only move data (what grouping left of them);
1. all ops, but only factors that pass through, and from the large side of a broadcast to the small;
2. all ops, factors too that are summed, shifted or gathered;
3. also from the small side of a broadcast to the large.

Vectors that are broadcast for a product with matrices are the small side of that.

Where two factors of an op want one mesh axis, the factor of the larger array wins, then that of
the earlier one.
"""

from collections.abc import Sequence

from autoshard.graph.link import PASSING
from autoshard.graph.program import WHOLE, Layout, Op, Program
from autoshard.graph.splits import factors_split, layout_of, splits_evenly

__all__ = ["LEVELS", "begins", "has_more", "may_tear", "may_turn", "spread", "spread_look"]

LEVELS = 4


def may_tear(op: Op) -> bool:
    """Whether a matmul's result meets others, and is no smaller than the smaller of its operands.

    Of smaller ones, as where the gradient of the logits becomes that of a stream, programs compiled
    show no tear.
    """
    if not op.n_meetings:
        return False
    return op.results[0].n_bytes >= min(operand.n_bytes for operand in op.operands)


def spread_look(op: Op, program: Program) -> tuple[object, ...]:
    """All that decides how an op spreads layouts."""
    groups = op.groups
    return (
        op.kind,
        op.vectors,
        len(op.operands),
        _late(op),
        tuple(
            (array.factors, array.inner, array.n_bytes, program.groups[array.group].sizes)
            for array in op.arrays
        ),
        tuple(groups.index(group) for group in groups),
    )


def _late(op: Op) -> frozenset[int]:
    """The factors that do not just pass through."""
    return op.reduced | op.shifted | op.gathered


def may_turn(op: Op, level: int) -> bool:
    """Whether an op may spread anything at a level."""
    return op.kind != "unknown" and (level > 0 or op.kind in PASSING)


def begins(op: Op, level: int) -> bool:
    """Whether an op has a turn at the start of a level."""
    return may_turn(op, level) and (level == 1 or has_more(op, level))


def has_more(op: Op, level: int) -> bool:
    """Whether an op may do at a level what it did not at the one before."""
    moves = op.kind in PASSING
    broadcasts = op.kind == "broadcast" or op.vectors is not None
    return (moves, not moves, bool(_late(op)), broadcasts)[level]


def spread(
    op: Op,
    level: int,
    around: Sequence[Layout],
    sizes: Sequence[tuple[int, ...]],
    axis_sizes: Sequence[int],
) -> list[tuple[int, Layout]]:
    """Spread the layouts through one op.

    Args:
        op: the op.
        level: of its turn.
        around: the layouts of its operands, then its results.
        sizes: of the groups of those.
        axis_sizes: devices along each mesh axis.

    Returns:
        The arrays, by position, that changed, and their new layouts.
    """
    arrays = op.arrays
    n_operands = len(op.operands)
    wanted = _wanted(op, level, around, axis_sizes)
    small_side = op.kind == "broadcast" and level < LEVELS - 1
    changed = []
    for at in range(n_operands if small_side else len(arrays)):
        layout = around[at]
        for factor, axes in wanted:
            (dim,) = layout_of(arrays[at], (factor,))
            if dim == WHOLE:
                continue
            split = factors_split(arrays[at], layout, op.factor_sizes, axis_sizes)
            if any(own == factor and axis not in axes for axis, own in enumerate(split)):
                continue  # as in `_wanted`: the small side of a broadcast pulls elsewhere
            for axis in axes:
                finer = (*layout[:axis], dim, *layout[axis + 1 :])
                if layout[axis] != WHOLE or not splits_evenly(sizes[at], finer, axis_sizes):
                    continue
                if factors_split(arrays[at], finer, op.factor_sizes, axis_sizes)[axis] == factor:
                    layout = finer
        if layout != around[at]:
            changed.append((at, layout))
    return changed


def _wanted(
    op: Op, level: int, around: Sequence[Layout], axis_sizes: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """The factors to split and over which axes, the strongest first."""
    arrays = op.arrays
    small_side = op.kind == "broadcast" and level < LEVELS - 1
    late = _late(op)
    masks: dict[int, list[tuple[int, int, int]]] = {}
    for at in range(len(op.operands) if small_side else 0, len(arrays)):
        if at == op.vectors and level < LEVELS - 1:
            continue
        split = factors_split(arrays[at], around[at], op.factor_sizes, axis_sizes)
        for factor in {*split} - {WHOLE}:
            if level < 2 and factor in late:
                continue
            mask = sum(1 << axis for axis, own in enumerate(split) if own == factor)
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
