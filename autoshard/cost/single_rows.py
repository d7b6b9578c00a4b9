"""What products of vectors with matrices cost (see `autoshard.graph.vectors`).

TPUs do them without the matrix unit; and where sums of parts would be scattered, it is the matrix
that is dealt out again.
"""

from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.shards import local_bytes
from autoshard.cost.transfers import Transfer, collective
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.vectors import vectors_of

__all__ = ["matrix_seconds", "matrix_transfer", "shard_seconds"]

# By the cycles of the compilers for v3, v5e and v6e 0.24 to 0.3 of the bandwidth, were each element
# of the matrix of two bytes. Two rows go to the matrix unit.
_SHARE = 0.26
_ITEM_BYTES = 2


def matrix_seconds(n_products: float, machine: Machine) -> float:
    """What it takes a TPU to multiply and sum up so many pairs, or to sum up so many elements."""
    return n_products * _ITEM_BYTES / (_SHARE * machine.chip.hbm_bytes_per_second)


def shard_seconds(array: Array, layout: Layout, machine: Machine) -> float:
    """What it takes a TPU to go through a device's shard of an array once, adding it up.

    Args:
        array: the array.
        layout: how it lies.
        machine: the chips.
    """
    n_bytes = local_bytes(array.n_bytes, layout, machine.axis_sizes)
    return matrix_seconds(n_bytes / array.itemsize, machine)


def matrix_transfer(
    op: Op, layouts: Sequence[Layout], transfer: Transfer, machine: Machine
) -> Transfer:
    """What a TPU compiler moves for a contraction, if that is of vectors.

    Args:
        op: the contraction.
        layouts: of each operand, then each result.
        transfer: what would be moved for a matmul.
        machine: the chips and links.
    """
    if transfer.kind != "reduce-scatter" or vectors_of(op, op.factor_sizes) is None:
        return transfer
    matrix = max(range(len(op.operands)), key=lambda at: op.operands[at].n_bytes)
    layout = layouts[matrix]
    if layout[machine.axis_of(transfer.axis)] == WHOLE:
        return transfer
    n_bytes = local_bytes(op.operands[matrix].n_bytes, layout, machine.axis_sizes)
    return collective("all-to-all", transfer.axis, n_bytes, machine, matrix, layout)
