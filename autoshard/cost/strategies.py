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

from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Choice, Partition, partition_matmul
from autoshard.cost.transfers import (
    Transfer,
    as_all_reduce,
    folded_sums,
    layout_of,
    local_bytes,
    moved_bytes,
    n_parts,
    op_transfers,
)
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.propagation import splits_evenly
from autoshard.hardware.efficiency import matmul_efficiency, memory_seconds
from autoshard.mesh import round_up

__all__ = ["OpCost", "candidate_choices", "compute_seconds", "is_decomposed", "price_op"]

# XLA's default threshold for windowed matmuls (threshold_for_windowed_einsum_mib).
_WINDOWED_BYTES = 256 * 2**20
# So many pieces of a result the TPU compiler writes where they belong.
_PIECES_IN_PLACE = 4
# Width of a TPU's tile.
_LANES = 128
# Time of a matmul that sums its result along the batch (experts) as it goes, over that of the
# plain one: the compiler then makes the operand anew for every few columns. By the cycles of nine
# shapes compiled for v5e: 1.4 to 3.2.
_SUMMED_BATCH = 2.0
# A sum stays in the vector memory if it takes no more than this share with what is added up: seen
# where 4 x 16 MiB did on a v5e, and 3 x 24 MiB did not.
_SUM_ON_CHIP = 0.5
# Time of a ring of permutations over that of the collective in whose place it stands. Fitted to
# which of 1,600 reduce-scatters, of groups of two to eight, the TPU compiler decomposed: by the
# first it surely did, by the second it surely did not.
_DECOMPOSED = 1.35
_NOT_DECOMPOSED = 1.2
# So often a ring reads or writes its whole result beside the matmul, adding up as it goes. By the
# cycles of 24 matmuls compiled for v5e, groups of four and eight, 8 to 256 MiB: 6.5 to 8.6.
_RING_PASSES = 7


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
        if splits_evenly(op.factor_sizes, choice, axis_sizes):
            yield choice


def price_op(op: Op, layouts: Sequence[Layout], machine: Machine) -> OpCost:
    """The collectives and the compute of one run of an op.

    Args:
        op: the op.
        layouts: of each operand, then each result.
        machine: the chips and links.
    """
    if op.kind == "contraction" and len(op.arrays) == 3:
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


def _forced(op: Op, layouts: Sequence[Layout]) -> dict[int, int]:
    """The choices that XLA's partitioner makes of lookups whatever they cost.

    Where the rows of a table are split each device looks its own up, and what is found is summed;
    else where the indices and the result are split, each looks up its own. The gradient is summed
    where the updates are split along what they are summed over, unless the table is split over that
    axis too: then the updates are gathered, and each device adds up its own rows.
    """
    if op.kind not in ("gather", "scatter"):
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
    transfers = folded_sums(op_transfers(op, partition, layouts, machine), machine)
    seconds = compute_seconds(op, choice, machine)
    if machine.is_tpu and _sums_batch(op, choice, transfers, machine):
        seconds *= _SUMMED_BATCH
    if machine.decomposes_sums and op.kind == "contraction":
        uses_all = _uses_all_devices(choice, machine.axis_sizes)
        may_ring = uses_all and all(transfer.kind != "all-gather" for transfer in transfers)
        transfers = [_summed(op, one, seconds, may_ring, machine) for one in transfers]
        if op.is_convolution and uses_all:
            seconds *= max((_thinned(op, layouts, one, machine) for one in transfers), default=1.0)
    pieces = [_rewritten_pieces(op, layouts, transfer, machine) for transfer in transfers]
    if any(pieces):
        n_bytes = local_bytes(
            op.results[0].n_bytes, layout_of(op.results[0], choice), machine.axis_sizes
        )
        once = 2 * n_bytes / machine.chip.hbm_bytes_per_second
        transfers = [
            replace(transfer, alone_seconds=n * once)
            for transfer, n in zip(transfers, pieces, strict=True)
        ]
    return OpCost(
        choice=choice,
        compute_seconds=seconds + _sum_seconds(op, layouts, machine),
        transfers=tuple(transfers),
        is_copied=sum(pieces) >= _PIECES_IN_PLACE and choice != (WHOLE,) * len(choice),
    )


def _sum_seconds(op: Op, layouts: Sequence[Layout], machine: Machine) -> float:
    """What it takes to add the result of an op to others, where a sum goes to the main memory.

    On TPUs: what other compilers make of sums is not known, for they count no cycles.
    """
    if not (machine.is_tpu and op.addends and op.results):
        return 0.0
    chip = machine.chip
    shard = local_bytes(op.results[0].n_bytes, layouts[len(op.operands)], machine.axis_sizes)
    return sum(
        memory_seconds(chip, n * shard, shard)
        for n in op.addends
        if (n + 1) * shard > _SUM_ON_CHIP * chip.vmem_bytes
    )


def _sums_batch(op: Op, choice: Choice, transfers: Sequence[Transfer], machine: Machine) -> bool:
    """Whether a matmul's result is summed along the batch at once, of which a device has several.

    What collectives move first is summed along the batch later, on its own.
    """
    if op.summed_batch is None or any(transfer.operand is None for transfer in transfers):
        return False
    split = zip(choice, machine.axis_sizes, strict=True)
    parts = math.prod(n for factor, n in split if factor == op.summed_batch)
    return op.factor_sizes[op.summed_batch] > parts


def is_decomposed(
    transfer: Transfer, compute: float, machine: Machine, slowdown: float = _DECOMPOSED
) -> bool:
    """Whether the sums of a matmul go round in a ring while it makes them, behind its compute.

    The TPU compiler does a reduce-scatter so where that is the shorter: the longer of compute and
    ring, and what goes round before and after, against compute and collective one after the other.
    It does not where an operand is gathered too, or where several devices do the same. (XLA's
    `dot_handler.cc` has the formula.)

    Args:
        transfer: a collective of the matmul.
        compute: seconds of the matmul.
        machine: the chips and links.
        slowdown: time of the ring over that of the reduce-scatter.
    """
    if transfer.kind != "reduce-scatter" or not machine.decomposes_sums:
        return False
    n = machine.links[transfer.axis].size
    ring = slowdown * transfer.seconds
    saved = min(transfer.seconds, compute + transfer.seconds - ring)
    return saved > 2 * ring / n


def _summed(
    op: Op, transfer: Transfer, compute: float, may_ring: bool, machine: Machine
) -> Transfer:
    """What the TPU compiler makes of a collective of a matmul.

    Args:
        op: the matmul.
        transfer: the collective.
        compute: seconds of the matmul.
        may_ring: whether its sums may go round in a ring.
        machine: the chips and links.
    """
    if may_ring and is_decomposed(transfer, compute, machine):
        return _as_ring(transfer, machine)
    if may_ring and is_decomposed(transfer, compute, machine, _NOT_DECOMPOSED):
        return transfer
    whole = _is_summed_whole(op, transfer, machine)
    return as_all_reduce(transfer, machine) if whole else transfer


def _uses_all_devices(choice: Choice, axis_sizes: Sequence[int]) -> bool:
    """Whether no two devices do the same: where some do, no matmul compiled had a ring."""
    return all(factor != WHOLE for factor, n in zip(choice, axis_sizes, strict=True) if n > 1)


def _as_ring(transfer: Transfer, machine: Machine) -> Transfer:
    """A reduce-scatter whose sums go round while the matmul makes them."""
    passes = _RING_PASSES * transfer.n_bytes / machine.chip.hbm_bytes_per_second
    seconds = transfer.memory_seconds + passes
    return replace(transfer, overlapped=True, in_ring=True, memory_seconds=seconds)


def _is_summed_whole(op: Op, transfer: Transfer, machine: Machine) -> bool:
    """Whether the TPU compiler makes an all-reduce and a slice of a matmul's reduce-scatter.

    It does where the shards are an odd number of lane tiles wide, and where they are heads: the
    last dimension but one of four. Seen in 500 of its programs for v5e.
    """
    if transfer.kind != "reduce-scatter":
        return False
    dim, factors = transfer.target[transfer.axis], op.results[0].factors
    factor = factors[dim]
    if factor is None:
        return False
    shard = op.factor_sizes[factor] // machine.links[transfer.axis].size
    is_last, is_heads = dim == len(factors) - 1, len(factors) == 4 and dim == 2
    return (is_heads and shard > 1) or (is_last and shard % (2 * _LANES) == _LANES)


def _rewritten_pieces(
    op: Op, layouts: Sequence[Layout], transfer: Transfer, machine: Machine
) -> int:
    """How often a windowed matmul reads and writes its whole result anew, for one of its gathers.

    XLA runs a large matmul with a gathered operand piece by piece as the pieces arrive. Gathered
    along the contracted dimension, every further piece reads and writes the whole result once more;
    along another one, only where the pieces are more than four. Seen in programs of the TPU
    compiler (groups of four and of eight) at XLA's default threshold for windowed matmuls.
    """
    if op.kind != "contraction" or transfer.kind != "all-gather" or transfer.operand is None:
        return 0
    if sum(result.n_bytes for result in op.results) < _WINDOWED_BYTES:
        return 0
    array = op.operands[transfer.operand]
    gathered = array.factors[layouts[transfer.operand][transfer.axis]]
    size = machine.links[transfer.axis].size
    rewrites = gathered in op.reduced or size > _PIECES_IN_PLACE
    return size - 1 if rewrites and not array.is_held else 0


def _thinned(op: Op, layouts: Sequence[Layout], transfer: Transfer, machine: Machine) -> float:
    """Time of a convolution over that of the plain one, where the kernel goes round in a ring.

    The TPU compiler convolves with a slice of the channels at a time, and a slice narrower than the
    matrix unit's tile leaves the rest of it idle. Seen in programs of eight devices: kernels of 256
    channels, 3 x 3 and 1 x 1, took 3.6 times as long.
    """
    if transfer.kind == "all-gather" and transfer.operand is not None:
        array = op.operands[transfer.operand]
        dim = layouts[transfer.operand][transfer.axis]
    elif transfer.in_ring:
        array, dim = op.results[0], transfer.target[transfer.axis]
    else:
        return 1.0
    factor, tile = array.factors[dim], machine.chip.mxu_size
    if factor is None:
        return 1.0
    size, n = op.factor_sizes[factor], machine.links[transfer.axis].size
    return n * round_up(-(-size // n), tile) / round_up(size, tile)


def compute_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """Roofline of one device's share of an op.

    Matmuls, and loops that hold some, take `max(FLOPs / (peak x efficiency), bytes / bandwidth)`;
    reductions, lookups and moves take their bytes; what the compiler fuses into those takes nothing
    of its own.
    """
    if op.kind in ("broadcast", "elementwise", "reshape"):
        return 0.0
    sizes = machine.axis_sizes
    # A lookup reads the rows it returns, not the table; so does a slice.
    cuts = op.kind == "gather" or op.primitive in ("slice", "dynamic_slice")
    read, written = (
        sum(
            local_bytes(_bytes_in_memory(op, a, machine), layout_of(a, choice), sizes)
            for a in arrays
        )
        for arrays in (op.results if cuts else op.operands, op.results)
    )
    moving = memory_seconds(machine.chip, read, written)
    if not op.flops:
        return moving
    dtype = (
        "int8" if all(_in_eight_bits(op, array) for array in op.operands) else machine.matmul_dtype
    )
    peak = machine.chip.flops_per_second(dtype)
    if op.kind == "contraction":
        efficiency = matmul_efficiency(machine.chip, *_matmul_shape(op, choice, sizes), dtype)
    else:  # a loop, whose matmuls may have any shape
        efficiency = machine.chip.matmul_efficiency_max
    return max(moving, op.flops / n_parts(choice, sizes) / (peak * efficiency))


def _bytes_in_memory(op: Op, array: Array, machine: Machine) -> int:
    """Bytes of an array, whole, where its op reads or writes it.

    What a matmul writes is taken to be read by another.
    """
    return array.n_bytes if array.is_held else moved_bytes(op, array, machine)


def _in_eight_bits(op: Op, array: Array) -> bool:
    """Whether an array has a byte an element."""
    elements = math.prod(op.factor_sizes[f] for f in array.factors if f is not None)
    return array.n_bytes == elements


def _matmul_shape(op: Op, choice: Choice, axis_sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows (batch and space among them), contracted and columns of one device's matmul."""
    local = list(op.factor_sizes)
    for factor, n in zip(choice, axis_sizes, strict=True):
        if factor != WHOLE:
            local[factor] = max(1, local[factor] // n)
    left, right = set(op.operands[0].factors), set(op.operands[-1].factors)
    columns = right - left - {None}
    n = math.prod(local[f] for f in columns if f is not None)
    k = op.window * math.prod(local[f] for f in op.reduced)
    m = max(1, op.flops // (2 * n * k * n_parts(choice, axis_sizes)))
    return m, k, n
