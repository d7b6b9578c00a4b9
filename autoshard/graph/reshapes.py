"""The rule of reshapes: which parts of the dimensions before are which of those after."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from autoshard.graph.link import Label, Link, Shape

__all__ = ["reshape_rule"]


def reshape_rule(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """Runs of dimensions with equal products correspond, part by part.

    `[8, 16, 256] -> [8, 4096]`: 8 with 8; 16 with the major part of 4096, and 256 with what is
    inside that. What is inside splits only where the major part is split to the last, else the
    shards would interleave. Of runs that do not nest, as 6 x 4 and 8 x 3, the major parts alone
    correspond.
    """
    shapes = operands[0], results[0]
    labels: tuple[list[Label | None], ...] = ([None] * len(shapes[0]), [None] * len(shapes[1]))
    sizes: dict[Label, int] = {}
    inner: dict[Label, Label] = {}
    for run in _runs(*shapes):
        of_dims = [[shape[dim] for dim in dims] for shape, dims in zip(shapes, run, strict=True)]
        starts = [[math.prod(before[:i]) for i in range(len(before))] for before in of_dims]
        bounds = [*sorted({*starts[0], *starts[1]}), math.prod(of_dims[0])]
        if any(stop % start for start, stop in itertools.pairwise(bounds)):
            bounds = [1, math.gcd(of_dims[0][0], of_dims[1][0])]
        parts = {start: len(sizes) + i for i, start in enumerate(bounds[:-1])}
        for own, dims, at in zip(labels, run, starts, strict=True):
            for dim, start in zip(dims, at, strict=True):
                own[dim] = parts.get(start)
        sizes |= {parts[start]: stop // start for start, stop in itertools.pairwise(bounds)}
        inner |= dict(itertools.pairwise(parts.values()))
    return Link(
        kind="reshape",
        operands=(tuple(labels[0]),),
        results=(tuple(labels[1]),),
        sizes=sizes,
        inner=inner,
    )


def _runs(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of two shapes, those of size 1 left out, by shortest runs of equal product."""
    left = deque(dim for dim, size in enumerate(before) if size != 1)
    right = deque(dim for dim, size in enumerate(after) if size != 1)
    while left and right:
        run = [left.popleft()], [right.popleft()]
        a, b = before[run[0][0]], after[run[1][0]]
        while a != b:
            if a < b:
                run[0].append(left.popleft())
                a *= before[run[0][-1]]
            else:
                run[1].append(right.popleft())
                b *= after[run[1][-1]]
        yield run
