"""Products of a single row with a matrix, one token's with a weight or with what it attends to.

Before a program is partitioned TPU compilers make a multiplication of equal shapes and a sum of
them. So they do without the matrix unit; and where sums of parts would be scattered, it is the
matrix that is dealt out again.
"""

import math
from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.transfers import Transfer, all_to_all, local_bytes
from autoshard.graph.program import WHOLE, Layout, Op

__all__ = ["has_single_rows", "matrix_seconds", "matrix_transfer"]

# By the cycles of the compilers for v3, v5e and v6e 0.24 to 0.3 of the bandwidth, were each element
# of the matrix of two bytes. Two rows go to the matrix unit.
_SHARE = 0.26
_ITEM_BYTES = 2


def has_single_rows(op: Op, sizes: Sequence[int]) -> bool:
    """Whether a contraction is of vectors with matrices, one for each batch.

    Args:
        op: a contraction.
        sizes: of its factors, on one device or in all.
    """
    if op.window > 1 or len(op.operands) < 2:
        return False
    left, right = ({f for f in op.operands[at].factors if f is not None} for at in (0, -1))
    return any(math.prod(sizes[f] for f in own) == 1 for own in (left - right, right - left))


def matrix_seconds(n_products: float, machine: Machine) -> float:
    """What it takes a TPU to multiply and sum up so many pairs."""
    return n_products * _ITEM_BYTES / (_SHARE * machine.chip.hbm_bytes_per_second)


def matrix_transfer(
    op: Op, layouts: Sequence[Layout], transfer: Transfer, machine: Machine
) -> Transfer:
    """What a TPU compiler moves for a contraction, if that is of single rows.

    Args:
        op: the contraction.
        layouts: of each operand, then each result.
        transfer: what would be moved for a matmul.
        machine: the chips and links.
    """
    if transfer.kind != "reduce-scatter" or not has_single_rows(op, op.factor_sizes):
        return transfer
    matrix = max(range(len(op.operands)), key=lambda at: op.operands[at].n_bytes)
    layout = layouts[matrix]
    if layout[machine.axis_of(transfer.axis)] == WHOLE:
        return transfer
    n_bytes = local_bytes(op.operands[matrix].n_bytes, layout, machine.axis_sizes)
    return all_to_all(transfer.axis, n_bytes, matrix, layout, machine)
