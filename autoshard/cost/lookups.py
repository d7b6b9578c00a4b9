"""What lookups move: XLA's partitioner has the devices help that they would leave idle."""

import math
from collections.abc import Iterator, Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.shards import Choice, local_bytes
from autoshard.cost.transfers import Transfer, collective
from autoshard.graph.program import WHOLE, Layout, Op
from autoshard.graph.splits import layout_of

__all__ = ["by_idle_devices"]


def by_idle_devices(
    op: Op,
    transfers: Sequence[Transfer],
    choice: Choice,
    layouts: Sequence[Layout],
    machine: Machine,
) -> Iterator[Transfer]:
    """What a lookup moves whose table and data one axis splits, and another axis neither.

    The devices along that other axis help if their number divides that of the first, or is a
    multiple of it. Each takes a slice: of the sums of the rows found, as in a matmul; of the
    updates, or of the indices alone, in place of gathering them all, after which the table is
    summed over the other axis.

    Args:
        op: a lookup, or the gradient of one.
        transfers: its collectives.
        choice: the factor that it splits over each axis, or `WHOLE`.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    sizes = machine.axis_sizes
    idle = [a for a in range(len(sizes)) if choice[a] == WHOLE and layouts[-1][a] == WHOLE]
    n_idle = math.prod(sizes[axis] for axis in idle)
    updates = len(op.operands) - 1
    sliced: set[tuple[str, int | None]] = {("all-gather", updates - 1), ("all-gather", updates)}
    if op.kind == "gather":
        sliced = {("reduce-scatter", None)}
    most_slices = 0
    for transfer in transfers:
        n = machine.links[transfer.axis].size
        n_slices = math.gcd(n_idle, n)
        if not idle or (transfer.kind, transfer.operand) not in sliced or n_slices < min(n_idle, n):
            yield transfer
            continue
        axis, target, operand = transfer.axis, transfer.target, transfer.operand
        shard, part = transfer.n_bytes // n, transfer.n_bytes // n_slices
        if op.kind == "gather":
            yield collective("all-reduce", axis, part, machine, None, target)
        yield collective("collective-permute", machine.all_axes, shard, machine, operand, target)
        if op.kind == "scatter":
            most_slices = max(most_slices, n_slices)
            if n_slices < n:
                yield collective("all-gather", axis, part, machine, operand, target)
    if most_slices:
        yield from _table_sums(op, choice, idle, most_slices, machine)


def _table_sums(
    op: Op, choice: Choice, idle: Sequence[int], n_slices: int, machine: Machine
) -> Iterator[Transfer]:
    """The sums of a table over so many idle devices, or over groups of so many."""
    sizes = machine.axis_sizes
    made = layout_of(op.results[0], choice)
    summed = local_bytes(op.results[0].n_bytes, made, sizes)
    for axis in idle:
        n_summed = math.gcd(sizes[axis], n_slices)
        n_slices //= n_summed
        if n_summed > 1:
            # What a group moves, of what all devices of the axis would.
            share = (1 - 1 / n_summed) / (1 - 1 / sizes[axis])
            yield collective("all-reduce", axis, int(share * summed), machine, None, made)
