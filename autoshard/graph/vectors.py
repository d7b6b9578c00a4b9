"""Products of vectors with matrices, one row for each matrix, as of one token's queries with keys.

Before a program is partitioned TPU compilers make a multiplication of equal shapes and a sum of
them: the vectors are broadcast to the shape of the matrices. Where a device has a single row of
several they do so afterwards. They leave those whose result has elements of another size.
"""

import math
from collections.abc import Sequence

from autoshard.graph.program import Op

__all__ = ["broadcast_vectors", "vectors_of"]


def vectors_of(op: Op, sizes: Sequence[int]) -> int | None:
    """Which operand of a contraction has a single row for each of the other's matrices, if one has.

    None where its result has elements of another size.

    Args:
        op: a contraction.
        sizes: of its factors, on one device or in all.
    """
    if op.window > 1 or len(op.operands) < 2 or len({array.itemsize for array in op.arrays}) > 1:
        return None
    last = len(op.operands) - 1
    left, right = ({f for f in op.operands[at].factors if f is not None} for at in (0, last))
    for at, own in ((0, left - right), (last, right - left)):
        if math.prod(sizes[factor] for factor in own) == 1:
            return at
    return None


def broadcast_vectors(op: Op) -> int | None:
    """Which operand of a contraction a TPU compiler broadcasts to the other's shape, if any."""
    return vectors_of(op, op.factor_sizes) if op.kind == "contraction" else None
