"""Where part of a mesh axis splits an array, as of 8 devices 4 split 4 heads and 2 what is in each.

A reshape of 8 heads to 4 x 2 makes two factors of one. Where an axis of 8 splits the 8, XLA has 4
of its places split the 4, and the 2 that are left in each split the 2 (Shardy calls these
sub-axes). Here such an axis is cut into two parts, of 4 and of 2, and layouts have an entry a part.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from math import prod
from typing import Self

from autoshard.graph.program import WHOLE, Layout, Op, Program
from autoshard.graph.splits import factors_held

__all__ = ["AxisParts"]


@dataclass(frozen=True, kw_only=True)
class AxisParts:
    """The axes of a mesh, and what each is cut into.

    Attributes:
        parts: for each axis the sizes of its parts, major to minor; one part where it stays whole.
    """

    parts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, program: Program, axis_sizes: Sequence[int]) -> Self:
        """Cut the last mesh axis that a reshape splits over two factors; leave all others whole.

        Not where no other op can split the major part of a dimension, as that of two halves that
        are joined after a rotary embedding.
        """
        uses = Counter(
            (array.group, dim)
            for op in program.ops
            for array in op.arrays
            for dim, factor in enumerate(array.factors)
            if factor is not None
        )
        bounds = {bound for op in program.ops for bound in _bounds(op, uses)}
        parts = [_parts(size, bounds) for size in axis_sizes]
        last = max((axis for axis, of in enumerate(parts) if len(of) > 1), default=None)
        return cls(
            parts=tuple(of if axis == last else (prod(of),) for axis, of in enumerate(parts))
        )

    @classmethod
    def uncut(cls, axis_sizes: Sequence[int]) -> Self:
        """Each axis whole."""
        return cls(parts=tuple((size,) for size in axis_sizes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each part, one axis after the other."""
        return tuple(size for parts in self.parts for size in parts)

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """For each axis, where its parts stand in a layout."""
        starts = [sum(map(len, self.parts[:axis])) for axis in range(len(self.parts) + 1)]
        return tuple(tuple(range(start, stop)) for start, stop in pairwise(starts))

    @property
    def is_cut(self) -> bool:
        """Whether some axis is cut."""
        return len(self.sizes) > len(self.parts)

    def by_part(self, layout: Layout) -> Layout:
        """A layout by axes as one by their parts.

        >>> AxisParts(parts=((2,), (4, 2))).by_part((-1, 3))
        (-1, 3, 3)
        """
        return tuple(
            dim for dim, parts in zip(layout, self.parts, strict=True) for _ in range(len(parts))
        )

    def by_axis(self, layouts: Iterable[Layout]) -> list[Layout] | None:
        """The same by axes; None where parts of one axis split different dimensions."""
        found = []
        for layout in layouts:
            dims = [{layout[place] for place in places} for places in self.places]
            if any(len(one) > 1 for one in dims):
                return None
            found.append(tuple(dim for (dim,) in dims))
        return found

    def names(self, layout: Layout, axes: Sequence[str]) -> dict[int, str]:
        """Dimension -> what splits it: axes, or parts as `axis:(size of those before)size`.

        >>> AxisParts(parts=((2,), (4, 2))).names((0, 2, 3), ("batch", "model"))
        {0: 'batch', 2: 'model:(1)4', 3: 'model:(4)2'}
        """
        names: dict[int, list[str]] = {}
        for axis, places, sizes in zip(axes, self.places, self.parts, strict=True):
            dims = [layout[place] for place in places]
            for dim, run in groupby(range(len(dims)), key=dims.__getitem__):
                own = list(run)
                part = f"{axis}:({prod(sizes[: own[0]])}){prod(sizes[i] for i in own)}"
                names.setdefault(dim, []).append(axis if len(own) == len(sizes) else part)
        return {dim: ",".join(found) for dim, found in names.items() if dim != WHOLE}


def _bounds(op: Op, uses: Mapping[tuple[int, int], int]) -> Iterator[tuple[int, int]]:
    """Where factors that one dimension holds meet: the places before, of so many in all."""
    if not any(array.inner for array in op.arrays):
        return
    used = {
        factor
        for array in op.arrays
        for dim, factor in enumerate(array.factors)
        if uses[array.group, dim] > 1 and dim not in factors_held(array)
    }
    for array in op.arrays:
        for held in factors_held(array).values():
            sizes = [op.factor_sizes[factor] for factor in held]
            for i in range(1, len(sizes)):
                if held[i - 1] in used:
                    yield prod(sizes[:i]), prod(sizes)


def _parts(size: int, bounds: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Cut an axis at the bounds that it goes over, if they nest."""
    cuts = {before for before, n in bounds if before < size and size % before == n % size == 0}
    ends = [1, *sorted(cuts), size]
    if any(stop % start for start, stop in pairwise(ends)):
        return (size,)
    return tuple(stop // start for start, stop in pairwise(ends))
