"""What one op costs, given the layouts of its operands and results.

On each mesh axis an op splits one of its factors or none. Given that choice,

- compute is the op's share: FLOPs over peak times the efficiency of the shard's shape, or bytes
  over memory bandwidth, whichever is longer (roofline);
- collectives move what does not lie as the op wants it (`autoshard.cost.transfers`);
- where the compiler runs collectives and sums together with a matmul, what that adds to either.

XLA's partitioner makes the choice: of a matmul as `autoshard.cost.partitioner` tells, of other ops
the cheapest among the factors that some operand or result splits over that axis, and none; a lookup
leaves less to choose.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autoshard.cost.collective_matmul import (
    PIECES_IN_PLACE,
    summed,
    thinning,
    uses_all_devices,
    windowed,
)
from autoshard.cost.joined_halves import joined
from autoshard.cost.lookups import by_idle_devices
from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Partition, partition_matmul
from autoshard.cost.roofline import compute_seconds, fetch_seconds, sum_seconds
from autoshard.cost.shards import Choice
from autoshard.cost.single_rows import matrix_transfer
from autoshard.cost.transfers import Transfer, folded_sums, op_transfers, transfer_by_part
from autoshard.graph.program import WHOLE, Layout, Op
from autoshard.graph.splits import factors_split, is_possible

__all__ = ["OpCost", "candidate_choices", "price_op"]

# Time of a matmul that sums its result along the batch (experts) as it goes, over that of the
# plain one: the compiler then makes the operand anew for every few columns. By the cycles of nine
# shapes compiled for v5e: 1.4 to 3.2.
_SUMMED_BATCH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Compute and collectives of one op under one choice.

    Attributes:
        choice: the factor split over each axis, or `WHOLE`.
        compute_seconds: of one run.
        fetch_seconds: of its weights, behind what runs before.
        transfers: its collectives.
        n_summed: how many results of its batch a device sums as it makes them; 1 for any other op.
        share: what is multiplied and written of its result: less than 1 where it is sliced first.
    """

    choice: Choice
    compute_seconds: float
    fetch_seconds: float
    transfers: tuple[Transfer, ...]
    n_summed: int = 1
    share: float = 1.0

    @property
    def in_loop(self) -> bool:
        """Whether its result is made piece by piece in a loop."""
        return any(one.pieces > PIECES_IN_PLACE for one in self.transfers)

    @property
    def is_copied(self) -> bool:
        """Whether its result is made in pieces in one place and then written to another."""
        return self.in_loop and any(factor != WHOLE for factor in self.choice)

    @property
    def is_windowed(self) -> bool:
        """Whether it gathers an operand piece by piece."""
        return _are_windowed(self.transfers)

    @property
    def total_seconds(self) -> float:
        """Everything one after the other, each once: what the choice is made by."""
        return max(self.compute_seconds, self.fetch_seconds) + sum(
            transfer.seconds + transfer.memory_seconds for transfer in self.transfers
        )


def candidate_choices(
    op: Op, layouts: Sequence[Sequence[Layout]], axis_sizes: Sequence[int]
) -> Iterator[Choice]:
    """The choices worth pricing: on each axis, none or a factor that a layout splits over it.

    Args:
        op: the op.
        layouts: for each operand, then each result, the layouts it may have.
        axis_sizes: devices along each axis.
    """
    splits = [
        factors_split(array, layout, op.factor_sizes, axis_sizes)
        for array, possible in zip(op.arrays, layouts, strict=True)
        for layout in possible
    ]
    options = []
    for axis in range(len(axis_sizes)):
        found = {WHOLE, *(split[axis] for split in splits)}
        if found & op.gathered:
            # What it needs whole it may have split along another dimension meanwhile.
            found = {WHOLE, *range(len(op.factor_sizes))} - op.gathered
        options.append(sorted(found))
    for choice in itertools.product(*options):
        if is_possible(op, choice, axis_sizes):
            yield choice


def price_op(op: Op, layouts: Sequence[Layout], machine: Machine) -> OpCost:
    """The collectives and the compute of one run of an op.

    Args:
        op: the op.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    by_axis, uncut = machine.simplest(layouts)
    if uncut is not machine:
        return _by_part(price_op(op, by_axis, uncut), machine)
    if op.vectors is not None and len(op.arrays) == 3:
        product = _as_product(op, layouts, machine)
        if product is not None:
            return _cost(op, Partition(choice=product), layouts, machine)
    if op.kind == "contraction" and len(op.arrays) == 3 and not op.gathered:
        partition = partition_matmul(op, layouts, machine.axis_sizes)
        if partition is not None:
            return _cost(op, partition, layouts, machine)
    forced = _forced(op, layouts)
    return min(
        (
            _cost(op, Partition(choice=choice), layouts, machine)
            for choice in candidate_choices(op, [(lay,) for lay in layouts], machine.axis_sizes)
            if all(choice[axis] == factor for axis, factor in forced.items())
        ),
        key=lambda cost: cost.total_seconds,
    )


def _by_part(cost: OpCost, machine: Machine) -> OpCost:
    """A cost on `machine.uncut` as one on the machine."""
    by_part = machine.parts.by_part
    transfers = (transfer_by_part(transfer, machine) for transfer in cost.transfers)
    return replace(cost, choice=by_part(cost.choice), transfers=tuple(transfers))


def _as_product(op: Op, layouts: Sequence[Layout], machine: Machine) -> Choice | None:
    """What a multiplication of equal shapes splits: what its matrices are split by.

    None where those are there before the step, for then they have a layout of their own.
    """
    assert op.vectors is not None
    array, layout = op.operands[1 - op.vectors], layouts[1 - op.vectors]
    if array.is_held:
        return None
    choice = factors_split(array, layout, op.factor_sizes, machine.axis_sizes)
    return choice if is_possible(op, choice, machine.axis_sizes) else None


def _forced(op: Op, layouts: Sequence[Layout]) -> dict[int, int]:
    """The choices that XLA's partitioner makes of lookups whatever they cost.

    Where the rows of a table are split each device looks its own up, and what is found is summed;
    else where the indices and the result are split, each looks up its own. The gradient is summed
    where the updates are split along what they are summed over, unless the table is split over that
    axis too: then the updates are gathered, and each device adds up its own rows.
    """
    if op.kind not in ("gather", "scatter") or not op.results:
        return {}
    n = len(op.operands)
    table, mine = (0, n - 1) if op.kind == "gather" else (n, n - 1)
    forced: dict[int, int] = {}
    for axis in range(len(layouts[0])):
        rows, data, result = (_factor(op, at, layouts, axis) for at in (table, mine, n))
        if op.kind == "gather":
            if rows in op.reduced:
                forced[axis] = rows
            elif rows == WHOLE and data == result != WHOLE:
                forced[axis] = data
        elif rows == WHOLE and data in op.reduced:
            forced[axis] = data
    return forced


def _factor(op: Op, position: int, layouts: Sequence[Layout], axis: int) -> int:
    """The factor that an axis splits of an operand or result, or `WHOLE`."""
    dim = layouts[position][axis]
    factor = op.arrays[position].factors[dim] if dim != WHOLE else None
    return WHOLE if factor is None else factor


def _cost(op: Op, partition: Partition, layouts: Sequence[Layout], machine: Machine) -> OpCost:
    """Price one choice with what is permuted for it."""
    choice = partition.choice
    permuted = [partition.permuted.get(at, layout) for at, layout in enumerate(layouts)]
    transfers = op_transfers(op, partition, layouts, machine)
    if op.kind in ("gather", "scatter"):
        transfers = list(by_idle_devices(op, transfers, choice, layouts, machine))
    transfers = folded_sums(transfers, machine)
    if op.kind == "reshape":
        transfers = joined(op, layouts, transfers, machine)
    if machine.compiles_for_tpu and op.kind == "contraction":
        transfers = [matrix_transfer(op, layouts, one, machine) for one in transfers]
    seconds = compute_seconds(op, choice, machine)
    n_summed = _n_summed(op, choice, transfers, machine)
    if n_summed > 1:
        seconds *= _SUMMED_BATCH
    if machine.decomposes_sums and op.kind == "contraction":
        uses_all = uses_all_devices(choice, machine.axis_sizes)
        may_ring = uses_all and all(transfer.kind != "all-gather" for transfer in transfers)
        transfers = [summed(op, choice, one, may_ring, machine) for one in transfers]
        if op.is_convolution and uses_all:
            seconds *= max((thinning(op, permuted, one, machine) for one in transfers), default=1.0)
    transfers = [windowed(op, choice, permuted, one, seconds, machine) for one in transfers]
    share = _share(op, choice, transfers)
    return OpCost(
        choice=choice,
        compute_seconds=share * seconds + sum_seconds(op, layouts, machine),
        fetch_seconds=fetch_seconds(op, choice, machine),
        transfers=tuple(transfers),
        n_summed=n_summed,
        share=share,
    )


def _are_windowed(transfers: Sequence[Transfer]) -> bool:
    return any(transfer.pieces > 1 for transfer in transfers)


def _share(op: Op, choice: Choice, transfers: Sequence[Transfer]) -> float:
    """What is multiplied of a matmul's result: the slice alone, if an operand is sliced first.

    It is not where pieces or partial sums are added up before, or shards shift.
    """
    if op.slicing is None or _are_windowed(transfers):
        return 1.0
    if any(transfer.operand is None for transfer in transfers):
        return 1.0
    return 1.0 if op.slicing.factors & set(choice) else float(op.slicing.share)


def _n_summed(op: Op, choice: Choice, transfers: Sequence[Transfer], machine: Machine) -> int:
    """How many results along the batch a device sums at once, where the TPU compiler does so.

    What collectives move first is summed along the batch later, on its own.
    """
    if op.summed_batch is None or not machine.compiles_for_tpu:
        return 1
    if any(transfer.operand is None for transfer in transfers):
        return 1
    split = zip(choice, machine.axis_sizes, strict=True)
    parts = math.prod(n for factor, n in split if factor == op.summed_batch)
    return op.factor_sizes[op.summed_batch] // parts
