"""What a layout splits of an op: between the dimensions of its arrays and its factors."""

from collections.abc import Sequence

from autoshard.graph.program import WHOLE, Array, Layout, Op

__all__ = ["factors_held", "factors_split", "is_possible", "layout_of", "splits_evenly"]


def splits_evenly(sizes: Sequence[int], layout: Layout, axis_sizes: Sequence[int]) -> bool:
    """Whether each dimension is a multiple of the product of the mesh axes that split it."""
    left = list(sizes)
    for dim, n in zip(layout, axis_sizes, strict=True):
        if dim != WHOLE:
            if left[dim] % n:
                return False
            left[dim] //= n
    return True


def factors_held(array: Array) -> dict[int, list[int]]:
    """Dimension -> the factors that it holds, major to minor, where there are several."""
    held: dict[int, list[int]] = {}
    for factor, dim in array.inner:
        major = array.factors[dim]
        assert major is not None, array
        held.setdefault(dim, [major]).append(factor)
    return held


def factors_split(
    array: Array, layout: Layout, factor_sizes: Sequence[int], axis_sizes: Sequence[int]
) -> Layout:
    """The factor that each axis splits, or `WHOLE`.

    Of the factors that one dimension holds axes fill the major one first, and the one inside it
    only where that is split to the last.

    Args:
        array: one of an op's.
        layout: how it lies.
        factor_sizes: of the op.
        axis_sizes: devices along each axis.
    """
    factors = array.factors
    split = [
        WHOLE if dim == WHOLE or (factor := factors[dim]) is None else factor for dim in layout
    ]
    if not array.inner:  # as of most, many times in a search
        return tuple(split)
    for dim, held in factors_held(array).items():
        position, room, fits = 0, factor_sizes[held[0]], True
        for axis in (axis for axis, at in enumerate(layout) if at == dim):
            if room == 1 and position + 1 < len(held):
                position += 1
                room = factor_sizes[held[position]]
            fits = fits and room % axis_sizes[axis] == 0
            split[axis] = held[position] if fits else WHOLE
            room //= axis_sizes[axis]
    return tuple(split)


def layout_of(array: Array, choice: Layout) -> Layout:
    """How an array lies where its op splits these factors."""
    factors = array.factors
    inner = dict(array.inner) if array.inner else {}
    return tuple(
        [
            factors.index(factor)
            if factor != WHOLE and factor in factors
            else inner.get(factor, WHOLE)
            for factor in choice
        ]
    )


def is_possible(op: Op, choice: Layout, axis_sizes: Sequence[int]) -> bool:
    """Whether every array of an op can lie as a choice of factors asks."""
    if not splits_evenly(op.factor_sizes, choice, axis_sizes):
        return False
    for array in op.arrays:
        if array.inner:
            own = {*array.factors, *(factor for factor, _ in array.inner)}
            asked = tuple(factor if factor in own else WHOLE for factor in choice)
            layout = layout_of(array, choice)
            if factors_split(array, layout, op.factor_sizes, axis_sizes) != asked:
                return False
    return True
