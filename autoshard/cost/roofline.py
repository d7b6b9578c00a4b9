"""What one device's share of an op takes, collectives aside.

- Matmuls, and loops that hold some, take `max(FLOPs / (peak x efficiency), bytes / bandwidth)`.
- TPUs multiply single rows without the matrix unit (`autoshard.cost.single_rows`), unless several
  share one matrix that repeats for them.
- Lookups and moves take their bytes. So do reductions, but TPUs add up no faster than they multiply
  single rows, and find the maxima of what a matmul makes while it writes.
- What repeats for a matmul a TPU reads once. To write it out takes it so much a tile; it does where
  a device has several parts to be repeated.
- Sums of a stream that do not fit the vector memory of a TPU take theirs.
- What the compiler fuses into these takes nothing of its own; so do products that sum nothing up.
"""

import math
from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Choice
from autoshard.cost.single_rows import matrix_seconds
from autoshard.cost.transfers import local_bytes, moved_bytes, n_parts
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.splits import layout_of
from autoshard.graph.vectors import vectors_of
from autoshard.hardware.efficiency import matmul_efficiency, memory_seconds

__all__ = ["compute_seconds", "sum_seconds"]

# A sum stays in the vector memory if it takes no more than this share with what is added up: seen
# where 4 x 16 MiB did on a v5e, and 3 x 24 MiB did not.
_SUM_ON_CHIP = 0.5

# A tile of a TPU's vector memory, and what it takes to write one whose rows repeat others: by the
# cycles of the compilers for v3, v5e and v6e 12 to 16 ns, and half where a row fills no tile, for
# then the rows lie across.
_ROWS, _LANES = 8, 128
_TILE_SECONDS = 15e-9
_NARROW_TILE_SECONDS = 7.5e-9


def compute_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """Roofline of one device's share of an op.

    Args:
        op: the op.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    if op.kind == "reshape" and machine.is_tpu:
        return sum(_repeating_seconds(op, result, choice, machine) for result in op.results)
    is_product = op.kind == "contraction" and not op.reduced and op.window == 1
    if op.is_fused or is_product or op.kind in ("broadcast", "elementwise", "reshape"):
        return 0.0
    sizes, chip = machine.axis_sizes, machine.chip
    # A lookup reads the rows it returns, not the table; so does a slice.
    cuts = op.kind == "gather" or op.primitive in ("slice", "dynamic_slice")
    read, written = (
        sum(_bytes_in_memory(op, array, choice, machine) for array in arrays)
        for arrays in (op.results if cuts else op.operands, op.results)
    )
    moving = memory_seconds(chip, read, written)
    if op.kind == "reduction" and machine.is_tpu:
        return 0.0 if op.primitive == "reduce_max" else max(moving, _adding(op, choice, machine))
    if not op.flops:
        return moving
    in_eight_bits = all(array.itemsize == 1 for array in op.operands)
    dtype = "int8" if in_eight_bits else machine.matmul_dtype
    if op.kind == "contraction":
        local = _local_sizes(op, choice, sizes)
        if machine.is_tpu and vectors_of(op, local) is not None and not _is_matmul(op, local):
            return max(moving, matrix_seconds(op.flops / 2 / n_parts(choice, sizes), machine))
        shape = _matmul_shape(op, local, n_parts(choice, sizes))
        efficiency = matmul_efficiency(chip, *shape, dtype)
    else:  # a loop, whose matmuls may have any shape
        efficiency = chip.matmul_efficiency_max
    peak = chip.flops_per_second(dtype)
    return max(moving, op.flops / n_parts(choice, sizes) / (peak * efficiency))


def _adding(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a TPU to add up what a device has."""
    return matrix_seconds(math.prod(op.factor_sizes) / n_parts(choice, machine.axis_sizes), machine)


def sum_seconds(op: Op, layouts: Sequence[Layout], machine: Machine) -> float:
    """What it takes to add the result of an op to others, where a sum goes to the main memory.

    On TPUs: what other compilers make of sums is not known, for they count no cycles.

    Args:
        op: the op.
        layouts: of each operand, then each result.
        machine: the chips.
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


def _repeating_seconds(op: Op, result: Array, choice: Choice, machine: Machine) -> float:
    """What it takes to write an array that repeats another, tile by tile; nothing for any other.

    Where a device repeats a single part it writes nothing. What repeats for single rows begins a
    tile with each part if so many of them fill one, and moves nothing if a part alone fills one.
    """
    repetition, sizes = result.repetition, _local_sizes(op, choice, machine.axis_sizes)
    if repetition is None:
        return 0.0
    parts, width = (result.factors[dim] for dim in (repetition.dim, repetition.width))
    if parts is None or width is None or sizes[parts] == 1:
        return 0.0
    shard = local_bytes(result.n_bytes, layout_of(result, choice), machine.axis_sizes)
    tiles = shard / (result.itemsize * _ROWS * _LANES)
    if repetition.for_rows and sizes[width] >= _LANES and _ROWS % repetition.times == 0:
        tiles *= _ROWS / repetition.times if repetition.times < _ROWS else 0
    return tiles * (_TILE_SECONDS if sizes[width] >= _LANES else _NARROW_TILE_SECONDS)


def _bytes_in_memory(op: Op, array: Array, choice: Choice, machine: Machine) -> int:
    """Bytes of a device's shard of an array, where its op reads or writes it.

    What a matmul writes is taken to be read by another, and what repeats to be read once by TPUs.
    """
    n_bytes = array.n_bytes if array.is_held else moved_bytes(op, array, machine)
    shard = local_bytes(n_bytes, layout_of(array, choice), machine.axis_sizes)
    repetition = array.repetition
    if repetition is None or op.kind != "contraction" or not machine.is_tpu:
        return shard
    factor = array.factors[repetition.dim]
    n_local = 1 if factor is None else _local_sizes(op, choice, machine.axis_sizes)[factor]
    return shard // min(repetition.times, n_local)


def _is_matmul(op: Op, local: Sequence[int]) -> bool:
    """Whether single rows that share a matrix, which repeats for each, are multiplied at once.

    So the queries of one key/value head, if a device has no more of these and their product was not
    made a broadcast before it was partitioned.
    """
    if op.vectors is not None:
        return False
    repeated = [(array.factors, array.repetition) for array in op.operands if array.repetition]
    parts = ((factors[repetition.dim], repetition.times) for factors, repetition in repeated)
    return any(factor is not None and 1 < local[factor] <= times for factor, times in parts)


def _matmul_shape(op: Op, local: Sequence[int], n_shares: int) -> tuple[int, int, int]:
    """Rows (batch and space among them), contracted and columns of one device's matmul."""
    left, right = set(op.operands[0].factors), set(op.operands[-1].factors)
    columns = right - left - {None}
    n = math.prod(local[f] for f in columns if f is not None)
    k = op.window * math.prod(local[f] for f in op.reduced)
    m = max(1, op.flops // (2 * n * k * n_shares))
    return m, k, n


def _local_sizes(op: Op, choice: Choice, axis_sizes: tuple[int, ...]) -> list[int]:
    """What of each factor one device has."""
    local = list(op.factor_sizes)
    for factor, n in zip(choice, axis_sizes, strict=True):
        if factor != WHOLE:
            local[factor] = max(1, local[factor] // n)
    return local
