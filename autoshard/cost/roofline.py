"""What one device's share of an op takes, collectives aside.

- Matmuls, and loops that hold some, take `max(FLOPs / (peak x efficiency), bytes / bandwidth)`. A
  TPU fetches weights ahead, as far as these are small, behind what runs before.
- In a step that neither trains nor decodes what matmuls read and make stays in a TPU's vector
  memory if it fits, scores of attention too (`autoshard.cost.scores`). Few rows do not hide what a
  matmul writes that the step returns.
- TPUs multiply single rows without the matrix unit (`autoshard.cost.single_rows`). Few heads on a
  device fill their registers in part.
- Lookups and moves take their bytes. So do reductions, but TPUs add up no faster than they multiply
  single rows, and find the maxima of what a matmul makes while it writes. To join arrays takes
  several passes (`autoshard.cost.cuts_and_joins`).
- What repeats for a matmul a TPU reads once. To write it out takes it so much a tile; it does where
  a device has several parts to be repeated.
- Sums of a stream take a part of the norm that reads them.
- What the compiler fuses into these takes nothing of its own; so do products that sum nothing up.
- No kernel of a TPU takes less than a microsecond, and a loop has several in each of its turns.
"""

import math
from collections.abc import Sequence

from autoshard.cost.cuts_and_joins import cutting_seconds, joining_seconds
from autoshard.cost.machine import Machine
from autoshard.cost.scores import attending_seconds, filled_share
from autoshard.cost.shards import (
    FLOAT32_BYTES,
    Choice,
    local_bytes,
    local_sizes,
    moved_bytes,
    n_parts,
)
from autoshard.cost.single_rows import matrix_seconds, shard_seconds
from autoshard.cost.transposing import tile_rows
from autoshard.graph.program import Array, Layout, Op
from autoshard.graph.splits import layout_of
from autoshard.graph.vectors import vectors_of
from autoshard.hardware.efficiency import (
    KERNEL_SECONDS,
    TILE_LANES,
    TILE_ROWS,
    matmul_efficiency,
    memory_seconds,
)

__all__ = ["compute_seconds", "fetch_seconds", "sum_seconds"]

# What a sum of two takes, over the time of a norm.
_SUM_SHARE = 1 / 3

# What it takes a TPU to write a tile whose rows repeat others: by the cycles of the compilers for
# v3, v5e and v6e 12 to 16 ns.
_TILE_SECONDS = 15e-9

# Of the bandwidth, with what logits are written that a matmul does not hide: next to nothing is
# hidden with so many rows, most with eight times as many, and all of it where what is contracted is
# no longer than a pass. In 50 programs for v5e it took 3.5 to 3.8 ps a byte with 512 rows, 0.7 with
# 2,048, 0.5 with 4,096 (in the median; up to 2.5), and 0.2 where 1,024 are contracted.
_RETURNED = 0.34
_HIDING_ROWS = 512
_HIDING_DEPTH = 1024

# Of the main memory's bandwidth, with what is stored in the vector memory that a matmul does not
# hide: all of what it makes by contracting so few, an eighth where it contracts eight times as
# many. In 20 programs for v5e it took 0.7 ps a byte with 384 or 512.
_STORED = 1.7
_SHALLOW = 512

# How many kernels of a TPU such an op is where it is small. In programs for v5e that decode a norm
# made three of its reduction (the sum, what is made of it, the scale in float32), and a rotary
# embedding two each of its slices and of what joins them.
_KERNELS = {"reduction": 3, "slice": 2}

# Weights up to this share of a TPU's vector memory are fetched ahead: in 80 programs for v5e that
# decode, of 128 MiB, nearly all shards up to 19 MB were, of 21 MB two in three, of 25 to 34 MB one
# in three, and of 58 MB none.
_FETCHED_SHARE = 0.14

# Where devices share the widths of heads, a TPU turns what it moves of a cache, and writes some
# arrays that repeat in tiles that are not full. In programs for v5e caches took 1.2 to 2.8 times
# as long (of 26), repeating 1.1 to 4 times (of 13); neither where a share is no wider than the 16
# rows of a tile of two-byte elements (of 4), nor where heads are narrow and whole (of 19).
_TURNED_CACHE = 1.5
_TURNED_REPETITION = 1.3
_UNTURNED_WIDTH = 16


def compute_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """Roofline of one device's share of an op, weights that are fetched ahead aside.

    Args:
        op: the op.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    seconds = _busy_seconds(op, choice, machine)
    if not seconds or op.moves_cache or not machine.compiles_for_tpu:
        return seconds
    return max(seconds, _KERNELS.get(op.kind, op.n_kernels) * KERNEL_SECONDS)


def fetch_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes to fetch the weights of an op ahead, behind what runs before.

    Args:
        op: the op.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    if op.kind != "contraction":
        return 0.0
    held = (_bytes_in_memory(op, array, choice, machine) for array in op.operands if array.is_held)
    fetched = sum(_bytes_fetched(n_bytes, machine) for n_bytes in held)
    return fetched / machine.chip.hbm_bytes_per_second


def _bytes_fetched(n_bytes: int, machine: Machine) -> int:
    """What a TPU fetches ahead of a weight: all of a small one, nothing of one twice as large."""
    if not machine.compiles_for_tpu:
        return 0
    small = int(_FETCHED_SHARE * machine.chip.vmem_bytes)
    return min(n_bytes, max(0, 2 * small - n_bytes))


def _busy_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """The time of a kernel, however short."""
    if op.kind == "reshape" and machine.compiles_for_tpu:
        return sum(_repeating_seconds(op, result, choice, machine) for result in op.results)
    is_product = op.kind == "contraction" and not op.reduced and op.window == 1
    is_shifted = not op.shifted.isdisjoint(choice)
    if op.is_brief and op.primitive in ("slice", "split") and machine.compiles_for_tpu:
        return cutting_seconds(op, choice, machine) if is_shifted else 0.0
    is_fused = op.is_fused and not is_shifted
    if is_fused or is_product or op.kind in ("broadcast", "elementwise", "reshape"):
        return 0.0
    # A lookup reads the rows it returns, not the table; so does a slice.
    cuts = op.kind == "gather" or op.primitive in ("slice", "dynamic_slice")
    read, written = (
        sum(_bytes_waited_for(op, array, choice, machine) for array in arrays)
        for arrays in (op.results if cuts else op.operands, op.results)
    )
    moving = memory_seconds(machine.chip, read, written)
    if not machine.compiles_for_tpu:
        return max(moving, _multiplying(op, choice, machine)) if op.flops else moving
    if op.primitive == "reduce_max":
        return 0.0
    if op.moves_cache:
        moving *= _thinness(op, op.results[0], choice, machine)
    working = _working(op, choice, written, machine)
    if op.scores is not None:
        return attending_seconds(op, op.scores, choice, working, machine)
    return max(moving, working)


def _working(op: Op, choice: Choice, written: float, machine: Machine) -> float:
    """What an op takes a TPU, were all that it reads and writes there at once.

    Args:
        op: the op.
        choice: the factor split over each axis, or `WHOLE`.
        written: bytes that it writes.
        machine: the chips.
    """
    if op.kind == "reduction":
        return _adding(op, choice, machine)
    if op.primitive in ("concatenate", "stack") and not op.moves_cache:
        return joining_seconds(op, choice, machine)
    if not op.flops:
        return 0.0
    unhidden = _unhidden(op, choice, written, machine) if op.kind == "contraction" else 0.0
    return _multiplying(op, choice, machine) + unhidden


def _unhidden(op: Op, choice: Choice, written: float, machine: Machine) -> float:
    """What a TPU does not hide behind a matmul of writing what it makes."""
    sizes, bandwidth = machine.axis_sizes, machine.chip.hbm_bytes_per_second
    rows, contracted, _ = _matmul_shape(op, local_sizes(op, choice, sizes), n_parts(choice, sizes))
    if op.is_returned and not op.backward:
        share = min(1.0, _HIDING_ROWS / rows) if contracted > _HIDING_DEPTH else 0.0
        return share * written / (_RETURNED * bandwidth)
    if not op.is_brief or op.scores is not None:
        return 0.0
    result = op.results[0]
    n_bytes = moved_bytes(op, result, machine)
    shard = local_bytes(n_bytes, layout_of(result, choice), sizes)
    stays = machine.keeps_on_chip(shard)
    return min(1.0, _SHALLOW / contracted) * shard / (_STORED * bandwidth) if stays else 0.0


def _multiplying(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to multiply what it has."""
    sizes, chip = machine.axis_sizes, machine.chip
    flops, local = op.flops / n_parts(choice, sizes), local_sizes(op, choice, sizes)
    if machine.compiles_for_tpu and op.kind == "contraction":
        vectors = vectors_of(op, local)
        if vectors is not None:
            matrix = op.operands[0 if vectors else -1]
            return _thinness(op, matrix, choice, machine) * matrix_seconds(flops / 2, machine)
    dtype = _matmul_dtype(op, machine)
    if op.kind == "contraction":
        shape = _matmul_shape(op, local, n_parts(choice, sizes))
        efficiency = matmul_efficiency(chip, *shape, dtype)
        if op.scores is not None and machine.compiles_for_tpu:
            efficiency *= filled_share(op, op.scores, local, min(shape[0], shape[2]), chip)
    else:  # a loop, whose matmuls may have any shape
        efficiency = chip.matmul_efficiency_max
    return flops / (chip.flops_per_second(dtype) * efficiency)


def _matmul_dtype(op: Op, machine: Machine) -> str:
    """The dtype in which an op multiplies: TPUs round float32 to what the others are of."""
    itemsizes = [array.itemsize for array in op.operands]
    if all(itemsize == 1 for itemsize in itemsizes):
        return "int8"
    is_wide = FLOAT32_BYTES in itemsizes and machine.chip.kind == "gpu"
    return "float32" if is_wide else machine.matmul_dtype


def _adding(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a TPU to add up what a device has."""
    return matrix_seconds(math.prod(op.factor_sizes) / n_parts(choice, machine.axis_sizes), machine)


def sum_seconds(op: Op, layouts: Sequence[Layout], machine: Machine) -> float:
    """What it takes to add the result of an op to others, as to a residual stream.

    The norm that reads a sum of two makes it in its own kernel, and takes a third longer: in
    programs for v5e 157 us for 118 (Gemma 7B and Phi 3, split by hand on 1x8), 217 for 157 (Llama 3
    8B) and 61 for 46 (Gemma 2 2B on 2x4), in the vector memory or not.

    On TPUs: what other compilers make of sums is not known, for they count no cycles.

    Args:
        op: the op.
        layouts: of each operand, then each result.
        machine: the chips.
    """
    if not (machine.compiles_for_tpu and op.addends and op.results):
        return 0.0
    seconds = shard_seconds(op.results[0], layouts[len(op.operands)], machine)
    return _SUM_SHARE * seconds * sum(op.addends) / 2


def _repeating_seconds(op: Op, result: Array, choice: Choice, machine: Machine) -> float:
    """What it takes to write an array that repeats another, tile by tile; nothing for any other.

    Where a device repeats a single part it writes nothing. What repeats for single rows begins a
    tile with each part if so many of them fill one, and moves nothing if a part alone fills one.
    """
    repetition, sizes = result.repetition, local_sizes(op, choice, machine.axis_sizes)
    if repetition is None:
        return 0.0
    parts, width = (result.factors[dim] for dim in (repetition.dim, repetition.width))
    if parts is None or width is None or sizes[parts] == 1:
        return 0.0
    shard = local_bytes(result.n_bytes, layout_of(result, choice), machine.axis_sizes)
    tiles = shard / (result.itemsize * TILE_ROWS * TILE_LANES)
    if repetition.for_rows and sizes[width] >= TILE_LANES and TILE_ROWS % repetition.times == 0:
        tiles *= TILE_ROWS / repetition.times if repetition.times < TILE_ROWS else 0
    if _UNTURNED_WIDTH < sizes[width] < op.factor_sizes[width]:
        tiles *= _TURNED_REPETITION
    return tiles * _TILE_SECONDS


def _bytes_in_memory(op: Op, array: Array, choice: Choice, machine: Machine) -> int:
    """Bytes of a device's shard of an array, where its op reads or writes it.

    What a matmul writes is taken to be read by another, and what repeats to be read once by TPUs.
    """
    n_bytes = array.n_bytes if array.is_held else moved_bytes(op, array, machine)
    shard = local_bytes(n_bytes, layout_of(array, choice), machine.axis_sizes)
    if array.reads.times > 1 and not array.reads.is_sliced:
        shard *= array.reads.times
        # TPUs round what a loop multiplies before it begins.
        is_wide = machine.compiles_for_tpu and op.flops and array.itemsize == FLOAT32_BYTES
        return shard // 2 if is_wide else shard
    repetition = array.repetition
    if repetition is None or op.kind != "contraction" or not machine.compiles_for_tpu:
        return shard
    factor = array.factors[repetition.dim]
    n_local = 1 if factor is None else local_sizes(op, choice, machine.axis_sizes)[factor]
    return shard // min(repetition.times, n_local)


def _bytes_waited_for(op: Op, array: Array, choice: Choice, machine: Machine) -> int:
    """The same, without what is fetched ahead, or stays in the vector memory until it is read."""
    n_bytes = _bytes_in_memory(op, array, choice, machine)
    if op.kind != "contraction":
        return n_bytes
    if array.is_held:
        return n_bytes - _bytes_fetched(n_bytes, machine)
    stays = op.is_brief and machine.keeps_on_chip(n_bytes)
    return 0 if stays else n_bytes


def _thinness(op: Op, array: Array, choice: Choice, machine: Machine) -> float:
    """Time over that of full tiles, where a device has little of each dimension of a cache.

    If the width of heads fills the lanes, rows of a tile are heads, and fewer than eight leave a
    TPU's registers empty in part. Half of the time goes by registers, half by bytes: two heads took
    2.4 times as long in programs for v5e, four 1.6 times. If no dimension fills them, part of each
    tile is padding: 64 tokens of heads of 64 took 2.6 times as long.
    """
    local = local_sizes(op, choice, machine.axis_sizes)
    factors = [f for f in array.factors if f is not None]
    sizes = [local[f] for f in factors]
    rows, width = [1, 1, *sizes][-2:]
    thinness = [max(1.0, TILE_LANES / max(sizes))]
    if op.moves_cache and _UNTURNED_WIDTH < width < op.factor_sizes[factors[-1]]:
        thinness.append(_TURNED_CACHE)
    if not array.repetition and width >= TILE_LANES and 1 < rows < TILE_ROWS:
        thinness.append((1 + TILE_ROWS / tile_rows(rows)) / 2)
    return max(thinness)


def _matmul_shape(op: Op, local: Sequence[int], n_shares: int) -> tuple[int, int, int]:
    """Rows (batch and space among them), contracted and columns of one device's matmul."""
    left, right = set(op.operands[0].factors), set(op.operands[-1].factors)
    columns = right - left - {None}
    n = math.prod(local[f] for f in columns if f is not None)
    k = op.window * math.prod(local[f] for f in op.reduced)
    m = max(1, op.flops // (2 * n * k * n_shares))
    return m, k, n
