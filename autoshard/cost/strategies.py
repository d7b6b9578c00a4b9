"""What one op costs, given the layouts of its operands and results.

On each mesh axis an op splits one of its factors or none. Given that choice,

- compute is the op's share: FLOPs over peak times the efficiency of the shard's shape, or bytes
  over memory bandwidth, whichever is longer (roofline);
- an operand that does not lie as the op wants it is gathered (all-gather), exchanged (all-to-all)
  or sliced (free);
- a reduced factor leaves partial sums: an all-reduce, or a reduce-scatter where the result is
  itself split over that axis.

The partitioner picks the choice; we take the cheapest among the factors that some operand or
result splits over that axis, and none.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from autoshard.cost.partitioner import Partition
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.hardware.chips import Chip
from autoshard.hardware.collectives import seconds as collective_seconds
from autoshard.hardware.efficiency import matmul_efficiency, memory_seconds
from autoshard.hardware.links import AxisLink, group_link
from autoshard.hardware.targets import Target
from autoshard.mesh import Mesh

__all__ = [
    "Choice",
    "Machine",
    "OpCost",
    "Transfer",
    "array_transfers",
    "candidate_choices",
    "compute_seconds",
    "cost_of_choice",
    "cost_of_partition",
    "layout_of",
    "local_bytes",
    "n_parts",
]

Choice = tuple[int, ...]

# XLA's default threshold for windowed matmuls (threshold_for_windowed_einsum_mib).
_WINDOWED_BYTES = 256 * 2**20
# So many pieces of a result the TPU compiler writes where they belong.
_PIECES_IN_PLACE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The chips and the links between them, mesh axis by mesh axis.

    Attributes:
        chip: one device.
        links: what carries each mesh axis of more than one device, in mesh order; last, what
            carries all of them together.
        matmul_dtype: dtype of the matmuls, for the peak.
    """

    chip: Chip
    links: tuple[AxisLink, ...]
    matmul_dtype: str = "bfloat16"

    @classmethod
    def of(cls, mesh: Mesh, target: Target, matmul_dtype: str = "bfloat16") -> Self:
        """The chips of a target under a mesh of as many devices."""
        axes = mesh.parallel_axes
        groups = [*((axis,) for axis in axes), axes]
        return cls(
            chip=target.chip,
            links=tuple(group_link(group, mesh, target) for group in groups),
            matmul_dtype=matmul_dtype,
        )

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Devices along each axis."""
        return tuple(link.size for link in self.links[:-1])

    @property
    def all_axes(self) -> int:
        """The index of the link of all axes together."""
        return len(self.links) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One collective of one op.

    Attributes:
        kind: as in `autoshard.hardware.collectives`.
        axis: index into `Machine.links`: a mesh axis, or all of them for a permutation.
        n_bytes: as `autoshard.hardware.collectives` counts them for the kind.
        seconds: time of one.
        overlapped: whether the chip's compiler hides it behind compute.
        memory_seconds: what compute pays for it: a gathered array is written to memory.
        operand: position of the operand that is moved, or None for the result.
        target: layout that the moved array gets.
        within: the axes in whose groups of devices it is moved. The partitioner finds again what it
            moved before only within the same.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Compute and collectives of one op under one choice.

    Attributes:
        choice: the factor split over each axis, or `WHOLE`.
        compute_seconds: of one run.
        transfers: its collectives.
        is_copied: whether its result is made in pieces in one place and then written to another.
    """

    choice: Choice
    compute_seconds: float
    transfers: tuple[Transfer, ...]
    is_copied: bool = False

    @property
    def total_seconds(self) -> float:
        """Everything one after the other: what the choice is made by."""
        return self.compute_seconds + sum(
            transfer.seconds + transfer.memory_seconds for transfer in self.transfers
        )


def local_bytes(n_bytes: int, layout: Layout, axis_sizes: Sequence[int]) -> int:
    """Bytes of one device's shard."""
    return -(-n_bytes // n_parts(layout, axis_sizes))


def n_parts(layout: Layout, axis_sizes: Sequence[int]) -> int:
    """Into how many shards a layout cuts an array."""
    return math.prod(n for dim, n in zip(layout, axis_sizes, strict=True) if dim != WHOLE)


def candidate_choices(
    op: Op, layouts: Sequence[Sequence[Layout]], axis_sizes: Sequence[int]
) -> Iterator[Choice]:
    """The choices worth pricing: on each axis, none or a factor that a layout splits over it.

    Args:
        op: the op.
        layouts: for each operand, then each result, the layouts it may have.
        axis_sizes: devices along each axis.
    """
    options = []
    for axis in range(len(axis_sizes)):
        found = {WHOLE}
        for array, possible in zip(op.arrays, layouts, strict=True):
            for layout in possible:
                factor = array.factors[layout[axis]] if layout[axis] != WHOLE else None
                if factor in op.gathered:
                    # What it needs whole it may have split along another dimension meanwhile.
                    found |= set(range(len(op.factor_sizes))) - op.gathered
                elif factor is not None:
                    found.add(factor)
        options.append(sorted(found))
    for choice in itertools.product(*options):
        parts: dict[int, int] = {}
        for factor, n in zip(choice, axis_sizes, strict=True):
            if factor != WHOLE:
                parts[factor] = parts.get(factor, 1) * n
        if all(op.factor_sizes[factor] % n == 0 for factor, n in parts.items()):
            yield choice


def cost_of_choice(op: Op, choice: Choice, layouts: Sequence[Layout], machine: Machine) -> OpCost:
    """Price one choice.

    Args:
        op: the op.
        choice: the factor split over each axis, or `WHOLE`.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    return cost_of_partition(op, Partition(choice=choice), layouts, machine)


def cost_of_partition(
    op: Op, partition: Partition, layouts: Sequence[Layout], machine: Machine
) -> OpCost:
    """Price one choice of a matmul with what the partitioner permutes for it.

    Args:
        op: the op.
        partition: the choice and the permutations.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    choice = partition.choice
    transfers = []
    for position, (array, layout) in enumerate(zip(op.arrays, layouts, strict=True)):
        operand = position if position < len(op.operands) else None
        if position in partition.permuted:
            layout = partition.permuted[position]
            transfers.append(_permuted(array, layout, machine, position))
        transfers += array_transfers(op, array, operand, choice, layout, machine)
    transfers = [
        part for transfer in transfers for part in _sliced(transfer, partition.n_slices, machine)
    ]
    if partition.within:
        transfers = [
            replace(t, within=partition.within[t.axis])
            if t.operand is not None and t.axis < len(choice)
            else t
            for t in transfers
        ]
    transfers += _shifts(op, choice, machine)
    seconds = compute_seconds(op, choice, machine)
    pieces = _rewritten_pieces(op, layouts, transfers, machine)
    if pieces:
        n_bytes = local_bytes(
            op.results[0].n_bytes, layout_of(op.results[0], choice), machine.axis_sizes
        )
        seconds += 2 * pieces * n_bytes / machine.chip.hbm_bytes_per_second
    return OpCost(
        choice=choice,
        compute_seconds=seconds,
        transfers=tuple(transfers),
        is_copied=pieces >= _PIECES_IN_PLACE and choice != (WHOLE,) * len(choice),
    )


def _permuted(array: Array, want: Layout, machine: Machine, position: int) -> Transfer:
    """An operand whose shards are cut to those of `want`, and sent to where they lie then."""
    n_bytes = local_bytes(array.n_bytes, want, machine.axis_sizes)
    return _transfer("collective-permute", machine.all_axes, n_bytes, machine, position, want)


def _sliced(transfer: Transfer, n_slices: int, machine: Machine) -> Iterator[Transfer]:
    """A reduce-scatter as the all-reduce of slices that are then permuted into place."""
    if n_slices == 1 or transfer.kind != "reduce-scatter":
        yield transfer
        return
    n_bytes, target = transfer.n_bytes // n_slices, transfer.target
    yield _transfer("all-reduce", transfer.axis, n_bytes, machine, None, target)
    yield _transfer("collective-permute", machine.all_axes, n_bytes, machine, None, target)


def _rewritten_pieces(
    op: Op, layouts: Sequence[Layout], transfers: Sequence[Transfer], machine: Machine
) -> int:
    """How often a windowed matmul reads and writes its whole result anew.

    XLA runs a large matmul with a gathered operand piece by piece as the pieces arrive. Gathered
    along the contracted dimension, every further piece reads and writes the whole result once more;
    along another one, only where the pieces are more than four. Seen in programs of the TPU
    compiler (groups of four and of eight) at XLA's default threshold for windowed matmuls.
    """
    result = op.results[0] if op.flops else None
    if result is None or result.n_bytes < _WINDOWED_BYTES:
        return 0
    pieces = 0
    for transfer in transfers:
        if transfer.kind == "all-gather" and transfer.operand is not None:
            array = op.operands[transfer.operand]
            gathered = array.factors[layouts[transfer.operand][transfer.axis]]
            size = machine.links[transfer.axis].size
            if not array.is_held and (gathered in op.reduced or size > _PIECES_IN_PLACE):
                pieces += size - 1
    return pieces


def _shifts(op: Op, choice: Choice, machine: Machine) -> Iterator[Transfer]:
    """Along a shifted factor devices pass on shards, the larger ones of what is cut or padded."""
    for axis, factor in enumerate(choice):
        if factor in op.shifted:
            target = layout_of(op.results[0], choice)
            n_bytes = max(
                local_bytes(array.n_bytes, layout_of(array, choice), machine.axis_sizes)
                for array in op.arrays
            )
            yield _transfer("collective-permute", axis, n_bytes, machine, None, target)


def array_transfers(
    op: Op, array: Array, operand: int | None, choice: Choice, layout: Layout, machine: Machine
) -> list[Transfer]:
    """The collectives between one array of an op, laid out as `layout`, and the op's choice.

    Args:
        op: the op.
        array: one of its operands or results.
        operand: position among the operands, or None for a result.
        choice: the factor split over each axis, or `WHOLE`.
        layout: how the array lies outside of the op.
        machine: the chips and links.
    """
    made = layout_of(array, choice)
    if operand is not None:
        return list(_moves(array, layout, made, machine, operand))
    partial = [axis for axis, factor in enumerate(choice) if factor in op.reduced]
    summed = tuple(layout[axis] if axis in partial else dim for axis, dim in enumerate(made))
    return [
        *_reductions(array, made, layout, partial, machine),
        *(_detours(op, array, made, layout, partial, machine) if op.kind == "gather" else ()),
        *_moves(array, summed, layout, machine, None),
    ]


def layout_of(array: Array, choice: Choice) -> Layout:
    """How an array lies where its op makes this choice."""
    factors = array.factors
    return tuple(
        factors.index(factor) if factor != WHOLE and factor in factors else WHOLE
        for factor in choice
    )


def _transfer(
    kind: str, axis: int, n_bytes: int, machine: Machine, operand: int | None, target: Layout
) -> Transfer:
    return Transfer(
        kind=kind,
        axis=axis,
        n_bytes=n_bytes,
        seconds=collective_seconds(kind, n_bytes, machine.links[axis]),
        overlapped=kind in machine.chip.overlapped_collectives,
        memory_seconds=n_bytes / machine.chip.hbm_bytes_per_second if kind == "all-gather" else 0.0,
        operand=operand,
        target=target,
    )


def _moves(
    array: Array,
    have: Layout,
    want: Layout,
    machine: Machine,
    position: int | None,
) -> Iterator[Transfer]:
    """From one layout to another: slices are free, the rest is gathered or exchanged.

    The TPU compiler starts the gather of a weight early, beside what runs before. For an array that
    the step makes the op that reads it mostly waits.
    """
    sizes = machine.axis_sizes
    for axis, (source, target) in enumerate(zip(have, want, strict=True)):
        if source in (target, WHOLE):
            continue
        if target == WHOLE:
            # The gathered array is still split over the axes that split it before and after.
            n_bytes = local_bytes(array.n_bytes, want, sizes)
            gather = _transfer("all-gather", axis, n_bytes, machine, position, want)
            yield replace(gather, overlapped=gather.overlapped and array.is_held)
        else:
            n_bytes = local_bytes(array.n_bytes, have, sizes)
            yield _transfer("all-to-all", axis, n_bytes, machine, position, want)


def _reductions(
    array: Array, made: Layout, layout: Layout, partial: Sequence[int], machine: Machine
) -> Iterator[Transfer]:
    """Partial sums over each axis of `partial`."""
    sizes = machine.axis_sizes
    now = made
    for axis in partial:
        n_bytes = local_bytes(array.n_bytes, now, sizes)
        if layout[axis] == WHOLE:
            yield _transfer("all-reduce", axis, n_bytes, machine, None, layout)
        else:
            yield _transfer("reduce-scatter", axis, n_bytes, machine, None, layout)
            now = tuple(layout[a] if a == axis else dim for a, dim in enumerate(now))


def _detours(
    op: Op, array: Array, made: Layout, layout: Layout, partial: Sequence[int], machine: Machine
) -> Iterator[Transfer]:
    """What a lookup moves besides where the sum over the table's split rows is itself split.

    XLA does not reduce-scatter where another axis splits the data: it sums shards that lie the
    other way round, and permutes them into place. Where the sum is split along a dimension of the
    table it sums the rows of all data first, and each device gets its own data by an all-to-all.
    """
    data = set(op.operands[-1].factors)
    for axis in partial:
        dim = layout[axis]
        for other, split in enumerate(made):
            if WHOLE in (dim, split) or split != layout[other]:
                continue
            if array.factors[dim] not in data:
                n_bytes = local_bytes(array.n_bytes, made, machine.axis_sizes)
                yield _transfer("all-to-all", other, n_bytes, machine, None, layout)
            n_bytes = local_bytes(array.n_bytes, layout, machine.axis_sizes)
            yield _transfer("collective-permute", other, n_bytes, machine, None, layout)


def compute_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """Roofline of one device's share of an op.

    Matmuls take `max(FLOPs / (peak x efficiency), bytes / bandwidth)`; reductions, lookups and
    moves take their bytes; what the compiler fuses into those takes nothing of its own.
    """
    if op.kind in ("broadcast", "elementwise", "reshape"):
        return 0.0
    sizes = machine.axis_sizes
    # A lookup reads the rows it returns, not the table; so does a slice.
    cuts = op.kind == "gather" or op.primitive in ("slice", "dynamic_slice")
    read, written = (
        sum(local_bytes(a.n_bytes, layout_of(a, choice), sizes) for a in arrays)
        for arrays in (op.results if cuts else op.operands, op.results)
    )
    moving = memory_seconds(machine.chip, read, written)
    if not op.flops:
        return moving
    dtype = (
        "int8" if all(_in_eight_bits(op, array) for array in op.operands) else machine.matmul_dtype
    )
    peak = machine.chip.flops_per_second(dtype)
    efficiency = matmul_efficiency(machine.chip, *_matmul_shape(op, choice, sizes), dtype)
    parts = math.prod(n for factor, n in zip(choice, sizes, strict=True) if factor != WHOLE)
    return max(moving, op.flops / parts / (peak * efficiency))


def _in_eight_bits(op: Op, array: Array) -> bool:
    """Whether an array has a byte an element."""
    elements = math.prod(op.factor_sizes[f] for f in array.factors if f is not None)
    return array.n_bytes == elements


def _matmul_shape(op: Op, choice: Choice, axis_sizes: Sequence[int]) -> tuple[int, int, int]:
    """Rows (batch factors among them), contracted and columns of one device's matmul."""
    local = list(op.factor_sizes)
    for factor, n in zip(choice, axis_sizes, strict=True):
        if factor != WHOLE:
            local[factor] = max(1, local[factor] // n)
    left, right = set(op.operands[0].factors), set(op.operands[-1].factors)
    columns = right - left - {None}
    n = math.prod(local[f] for f in columns if f is not None)
    k = math.prod(local[f] for f in op.reduced)
    m = math.prod(local) // (n * k)
    return m, k, n
