"""The collectives of one op: what moves an array from where it lies to where the op wants it.

- An operand that does not lie as the op wants it is gathered (all-gather), exchanged (all-to-all),
  permuted or sliced (free).
- A reduced factor leaves partial sums: an all-reduce, or a reduce-scatter where the result is
  itself split over that axis.
- A result that is wanted otherwise than it is made is moved like an operand.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Partition
from autoshard.cost.shards import Choice, local_bytes, moved_bytes
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.splits import layout_of
from autoshard.hardware.collectives import seconds as collective_seconds

__all__ = [
    "Transfer",
    "as_all_reduce",
    "collective",
    "folded_sums",
    "is_all_reduced",
    "lies_in_op",
    "op_transfers",
    "result_moves",
    "transfer_by_part",
    "transfers_between",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One collective of one op.

    Attributes:
        kind: as in `autoshard.hardware.collectives`.
        axis: index into `Machine.links`: of a part of a mesh axis, of one, or of several together.
        n_bytes: as `autoshard.hardware.collectives` counts them for the kind.
        seconds: time of one.
        overlapped: whether the chip's compiler hides it behind compute.
        memory_seconds: what compute pays for it: a gathered array is written to memory, if it
            does not fit a TPU's vector memory; the sums of a ring are read and written.
        pieces: how many of them a windowed matmul multiplies one after the other as they arrive,
            if no other op needs the same.
        adds_pieces: whether it adds up what it makes of them.
        alone_seconds: what compute pays besides in that case.
        operand: position of the operand that is moved, or None for the result.
        target: layout that the moved array gets.
        in_ring: whether it is a reduce-scatter whose sums go round while the matmul makes them.
        result: position of the result that is moved, if it is one.
        within: the axes in whose groups of devices it is moved. The partitioner finds again what it
            moved before only within the same.
        n_runs: how many of it there are, one after the other.
    """

    kind: str
    axis: int
    n_bytes: int
    seconds: float
    overlapped: bool
    memory_seconds: float
    operand: int | None
    target: Layout
    within: frozenset[int] = frozenset()
    n_runs: int = 1
    pieces: int = 1
    adds_pieces: bool = False
    alone_seconds: float = 0.0
    in_ring: bool = False
    result: int = 0


def is_all_reduced(transfers: Iterable[Transfer]) -> bool:
    """Whether an all-reduce sums the result of an op with such transfers."""
    return any(one.operand is None and one.kind == "all-reduce" for one in transfers)


def op_transfers(
    op: Op, partition: Partition, layouts: Sequence[Layout], machine: Machine
) -> list[Transfer]:
    """The collectives of an op.

    Args:
        op: the op.
        partition: what it splits over each axis, and what is permuted for it.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    transfers: list[Transfer] = []
    for position, (array, layout) in enumerate(zip(op.arrays, layouts, strict=True)):
        if position >= len(op.operands):
            made = _array_transfers(op, array, None, partition.choice, layout, machine)
            parts = [part for one in made for part in _sliced(one, partition.n_slices, machine)]
            result = position - len(op.operands)
            transfers += [replace(part, result=result) for part in parts] if result else parts
            continue
        if position in partition.permuted:
            layout = partition.permuted[position]
            transfers.append(_permuted(array, layout, machine, position))
        moved = _array_transfers(op, array, position, partition.choice, layout, machine)
        transfers += [_within(one, partition, machine) for one in moved]
    return [*transfers, *_shifts(op, partition.choice, machine)]


def _within(transfer: Transfer, partition: Partition, machine: Machine) -> Transfer:
    """A transfer in the groups of devices that its partition moves it in."""
    return replace(transfer, within=partition.within_of(machine.axis_of(transfer.axis)))


def as_all_reduce(transfer: Transfer, machine: Machine) -> Transfer:
    """A reduce-scatter done as an all-reduce, of which each device keeps its slice."""
    return collective(
        "all-reduce", transfer.axis, transfer.n_bytes, machine, transfer.operand, transfer.target
    )


def folded_sums(transfers: Sequence[Transfer], machine: Machine) -> list[Transfer]:
    """With the all-reduces of one result, axis after axis, as one over all of these axes.

    The compilers of TPUs and GPUs fold them (XLA's `all_reduce_folder.cc`), the partitioner does
    not.
    """
    kept, sums = list[Transfer](), dict[int, list[Transfer]]()
    for one in transfers:
        is_sum = one.operand is None and one.kind == "all-reduce"
        (sums.setdefault(one.result, []) if is_sum else kept).append(one)
    for result, summed in sums.items():
        axes = tuple(sorted(axis for one in summed for axis in machine.groups[one.axis]))
        if not machine.folds_sums or len(summed) < 2 or axes not in machine.groups:
            kept += summed
            continue
        folded = as_all_reduce(replace(summed[0], axis=machine.groups.index(axes)), machine)
        kept.append(replace(folded, result=result) if result else folded)
    return kept


def _permuted(array: Array, want: Layout, machine: Machine, position: int) -> Transfer:
    """An operand whose shards are cut to those of `want`, and sent to where they lie then."""
    n_bytes = local_bytes(array.n_bytes, want, machine.axis_sizes)
    return collective("collective-permute", machine.all_axes, n_bytes, machine, position, want)


def _sliced(transfer: Transfer, n_slices: int, machine: Machine) -> Iterator[Transfer]:
    """A reduce-scatter as the all-reduce of slices that are then permuted into place."""
    if n_slices == 1 or transfer.kind != "reduce-scatter":
        yield transfer
        return
    n_bytes, target = transfer.n_bytes // n_slices, transfer.target
    yield collective("all-reduce", transfer.axis, n_bytes, machine, None, target)
    yield collective("collective-permute", machine.all_axes, n_bytes, machine, None, target)


def _shifts(op: Op, choice: Choice, machine: Machine) -> Iterator[Transfer]:
    """Along a shifted factor devices pass on parts of what is cut or padded.

    Each device gets its shard of a result from as many others, or sends so many theirs, as the one
    shard is larger than the other, but no more than there are others. XLA permutes as often where
    that number is whole, the smaller of the two each time; else once or twice more or less often.
    """
    for axis, factor in enumerate(choice):
        if factor not in op.shifted:
            continue
        cut, *results = (
            local_bytes(array.n_bytes, layout_of(array, choice), machine.axis_sizes)
            for array in (op.operands[0], *op.results)
        )
        n_others = machine.axis_sizes[axis] - 1
        passes = [
            (min(n_others, math.ceil(max(cut, one) / min(cut, one))), min(cut, one))
            for one in results
            if one
        ]
        n_runs = sum(times for times, _ in passes)
        if n_runs:
            n_bytes = sum(times * part for times, part in passes) // n_runs
            target = layout_of(op.results[0], choice)
            part = collective("collective-permute", axis, n_bytes, machine, None, target)
            yield replace(part, n_runs=n_runs)


def _array_transfers(
    op: Op, array: Array, operand: int | None, choice: Choice, layout: Layout, machine: Machine
) -> list[Transfer]:
    """The collectives between one array of an op, laid out as `layout`, and the op's choice."""
    made, partial = lies_in_op(op, array, operand, choice)
    return transfers_between(op, array, operand, made, partial, layout, machine)


def lies_in_op(op: Op, array: Array, operand: int | None, choice: Choice) -> tuple[Layout, Choice]:
    """How an array lies in its op.

    Args:
        op: the op.
        array: one of its operands or results.
        operand: position among the operands, or None for a result.
        choice: the factor split over each axis, or `WHOLE`.

    Returns:
        Its layout there, and the factors that are summed over each axis, or `WHOLE`.
    """
    # What a loop sums over, some of its results have.
    summed = () if operand is not None else op.reduced.difference(array.factors)
    partial = tuple(factor if factor in summed else WHOLE for factor in choice)
    return layout_of(array, choice), partial


def transfers_between(
    op: Op,
    array: Array,
    operand: int | None,
    made: Layout,
    partial: Choice,
    layout: Layout,
    machine: Machine,
) -> list[Transfer]:
    """The collectives between an array as it lies in its op and as it lies outside.

    Args:
        op, array, operand: as for `lies_in_op`.
        made, partial: what that returns.
        layout: how the array lies outside of the op.
        machine: the chips and links.
    """
    (made, layout, partial), uncut = machine.simplest((made, layout, partial))
    moves = _between(op, array, operand, made, layout, partial, uncut)
    return list(moves) if uncut is machine else [transfer_by_part(m, machine) for m in moves]


def result_moves(op: Op, have: Layout, want: Layout, machine: Machine) -> list[Transfer]:
    """What moves the result of an op from one layout to another."""
    (have, want), uncut = machine.simplest((have, want))
    moves = _moves(op, op.results[0], have, want, uncut, None)
    return list(moves) if uncut is machine else [transfer_by_part(m, machine) for m in moves]


def transfer_by_part(transfer: Transfer, machine: Machine) -> Transfer:
    """A collective of `machine.uncut` as one of the machine."""
    places = machine.parts.places
    return replace(
        transfer,
        axis=len(machine.axis_sizes) + transfer.axis,
        target=machine.parts.by_part(transfer.target),
        within=frozenset(place for axis in transfer.within for place in places[axis]),
    )


def _between(
    op: Op,
    array: Array,
    operand: int | None,
    made: Layout,
    layout: Layout,
    partial: Choice,
    machine: Machine,
) -> Iterator[Transfer]:
    """The collectives between an array as its op has it and as it lies outside.

    Args:
        made: how it lies in the op.
        layout: how it lies outside.
        partial: the factors that are summed over each axis, or `WHOLE`.
    """
    if operand is not None:
        for move in _moves(op, array, layout, made, machine, operand):
            yield replace(move, n_runs=array.reads.times) if array.reads.times > 1 else move
        return
    sums = [axis for axis, factor in enumerate(partial) if factor != WHOLE]
    summed = tuple(layout[axis] if axis in sums else dim for axis, dim in enumerate(made))
    yield from _reductions(array, made, layout, sums, machine)
    if op.kind == "gather":
        yield from _detours(op, array, made, layout, sums, machine)
    yield from _moves(op, array, summed, layout, machine, None)


@lru_cache(maxsize=1 << 16)
def collective(
    kind: str,
    axis: int,
    n_bytes: int,
    machine: Machine,
    operand: int | None,
    target: Layout,
    waited_for: bool = False,
) -> Transfer:
    """A collective, one object for all that are equal: a search makes each a dozen times.

    Args:
        kind, axis, n_bytes, operand, target: see `Transfer`.
        machine: the chips and links.
        waited_for: whether nothing runs beside it, whatever the chip can do.
    """
    is_written = kind == "all-gather" and not machine.keeps_on_chip(n_bytes)
    return Transfer(
        kind=kind,
        axis=axis,
        n_bytes=n_bytes,
        seconds=collective_seconds(kind, n_bytes, machine.links[axis]),
        overlapped=not waited_for and kind in machine.chip.overlapped_collectives,
        memory_seconds=n_bytes / machine.chip.hbm_bytes_per_second if is_written else 0.0,
        operand=operand,
        target=target,
    )


def _moves(
    op: Op,
    array: Array,
    have: Layout,
    want: Layout,
    machine: Machine,
    position: int | None,
) -> Iterator[Transfer]:
    """From one layout to another: slices are free, the rest is gathered or exchanged.

    The TPU compiler starts the gather of a weight early, beside what runs before. For an array that
    the step makes the op that reads it mostly waits in the forward pass. It does not where it is a
    batch of matmuls (26 of 29 in programs for v5e): what attention reads is made before its scores,
    or other projections. What such a batch makes is waited for. In the backward pass there is other
    work meanwhile, except in groups of two.
    """
    sizes = machine.axis_sizes
    all_bytes = array.n_bytes if position is None else moved_bytes(op, array, machine)
    if array.reads.is_sliced:
        all_bytes //= array.reads.times
    # XLA gathers the last dimension first: what is gathered is still split along those before.
    now = [have[axis] if dim == WHOLE else dim for axis, dim in enumerate(want)]
    for axis in sorted(range(len(have)), key=have.__getitem__, reverse=True):
        source, target = have[axis], want[axis]
        if source in (target, WHOLE):
            continue
        if target == WHOLE:
            now[axis] = WHOLE
            n_bytes = local_bytes(all_bytes, tuple(now), sizes)
            early = (
                (array.is_held and array.reads.times == 1)
                or (machine.hides_gathers and op.is_batch and position is not None)
                or (machine.chip.kind == "tpu" and op.backward and sizes[axis] > 2)
            )
            yield collective("all-gather", axis, n_bytes, machine, position, want, not early)
        else:
            n_bytes = local_bytes(all_bytes, have, sizes)
            yield collective("all-to-all", axis, n_bytes, machine, position, want)


def _reductions(
    array: Array, made: Layout, layout: Layout, partial: Sequence[int], machine: Machine
) -> Iterator[Transfer]:
    """Partial sums over each axis of `partial`."""
    sizes = machine.axis_sizes
    now = made
    for axis in partial:
        n_bytes = local_bytes(array.n_bytes, now, sizes)
        if layout[axis] == WHOLE:
            yield collective("all-reduce", axis, n_bytes, machine, None, layout)
        else:
            yield collective("reduce-scatter", axis, n_bytes, machine, None, layout)
            now = tuple(layout[a] if a == axis else dim for a, dim in enumerate(now))


def _detours(
    op: Op, array: Array, made: Layout, layout: Layout, partial: Sequence[int], machine: Machine
) -> Iterator[Transfer]:
    """What a lookup moves besides where the sum over the table's split rows is itself split.

    XLA does not reduce-scatter where another axis splits the data: it sums shards that lie the
    other way round, and permutes them into place. Where the sum is split along a dimension of the
    table it sums the rows of all data first, and each device gets its own data by an all-to-all.
    """
    data = {factor for one in op.operands[1:] for factor in one.factors}
    for axis in partial:
        dim = layout[axis]
        for other, split in enumerate(made):
            if WHOLE in (dim, split) or split != layout[other]:
                continue
            if array.factors[dim] not in data:
                n_bytes = local_bytes(array.n_bytes, made, machine.axis_sizes)
                yield collective("all-to-all", other, n_bytes, machine, None, layout)
            n_bytes = local_bytes(array.n_bytes, layout, machine.axis_sizes)
            yield collective("collective-permute", other, n_bytes, machine, None, layout)
