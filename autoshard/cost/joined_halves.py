"""Two halves that are joined where the mesh splits more than the two of them.

A rotary embedding turns the halves of each head round: it stacks them and makes one dimension of
both. Where an axis of 8 splits that, XLA has two of its places split the stack and four each half
(Shardy calls these sub-axes), and permutes the halves into place.
"""

from collections.abc import Sequence
from dataclasses import replace

from autoshard.cost.machine import Machine
from autoshard.cost.shards import local_bytes
from autoshard.cost.transfers import Transfer, collective
from autoshard.graph.program import WHOLE, Layout, Op
from autoshard.graph.splits import factors_held

__all__ = ["joined"]

# So many permutations of a shard: whole halves take four, and one of two shards; halves that the
# axis splits take three, one of them of half a shard, and two gathers by twos.
_RUNS = 5


def joined(
    op: Op, layouts: Sequence[Layout], transfers: Sequence[Transfer], machine: Machine
) -> list[Transfer]:
    """The collectives of a reshape, permutations in place of gathers where it joins.

    Args:
        op: a reshape.
        layouts: of its operand, then its result.
        transfers: what would be moved for any other.
        machine: the chips and links.
    """
    layout, n_axes = layouts[-1], len(machine.axis_sizes)
    axes = [axis for axis in range(n_axes) if _splits_both(op, layout, axis, machine)]
    n_bytes = local_bytes(op.results[0].n_bytes, layout, machine.axis_sizes)
    moved = (
        collective("collective-permute", axis, n_bytes, machine, None, layout) for axis in axes
    )
    kept = [one for one in transfers if machine.axis_of(one.axis) not in axes]
    return [*kept, *(replace(one, n_runs=_RUNS) for one in moved)]


def _splits_both(op: Op, layout: Layout, axis: int, machine: Machine) -> bool:
    """Whether an axis splits the major factor of a dimension, and has places left for the next."""
    dim, n = layout[axis], machine.axis_sizes[axis]
    held = factors_held(op.results[0]).get(dim) if dim != WHOLE else None
    if held is None or layout.index(dim) != axis:
        return False
    major, minor = (op.factor_sizes[factor] for factor in held[:2])
    return major < n and n % major == 0 and minor % (n // major) == 0
