"""Matmuls whose collectives the compiler takes apart, to run beside the pieces of the matmul.

- The sums of a matmul may go round in a ring while it makes them, in place of a reduce-scatter.
- An operand may be gathered piece by piece, each multiplied as it arrives (windowed matmul).

What that adds to compute, and what it hides, was read in programs of the TPU compiler.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from autoshard.cost.machine import Machine
from autoshard.cost.shards import FLOAT32_BYTES, Choice, local_bytes, local_sizes
from autoshard.cost.transfers import Transfer, as_all_reduce
from autoshard.cost.transposing import cuts_tiles, innermost, turning_seconds
from autoshard.graph.program import WHOLE, Array, Layout, Op
from autoshard.graph.splits import layout_of
from autoshard.hardware.efficiency import KERNEL_SECONDS, TILE_LANES, TILE_ROWS, memory_seconds
from autoshard.mesh import round_up

__all__ = [
    "PIECES_IN_PLACE",
    "may_decompose",
    "summed",
    "thinning",
    "uses_all_devices",
    "windowed",
    "windowed_dims",
]

# The TPU compiler weighs rings by 15/16 of the printed link bandwidth, of which 0.9 are counted
# here: the least contracted dimension that it made rings of is 2,102 / n long on v5e and 4,898 / n
# on v6e, for n of four and eight, whatever the rows and columns.
_LINK_SHARE = (15 / 16) / 0.9
# So often a ring reads or writes its whole result beside the matmul, adding up as it goes. By the
# cycles of 24 matmuls compiled for v5e, groups of four and eight, 8 to 256 MiB: 6.5 to 8.6; in
# programs for v5e, where that stays in the vector memory, 5.9 to 6.0.
_RING_PASSES = 6
# Bytes of an element of those, and of the collective that it is weighed against. Float32 takes no
# longer, it is added up on the chip: 42 us for 16 MiB of SmolLM3's sums, where this says 72 and
# their bytes 143.
_RING_BYTES = 2
# So many kernels a ring takes a step, of which there are half as many as devices: it chooses what
# to send, multiplies, and adds. An operand that goes round is multiplied in one.
_RING_KERNELS = 3
# A sum is scattered in equal pieces of whole rows of tiles, each of more than the first and at most
# the second: by 40 gradients compiled for v5e, 2,048 to 16,384 wide; v5p and v6e do the same.
_PIECE_BYTES = (2**18 + 1, 19 * 2**18)
# XLA's default threshold for windowed matmuls (threshold_for_windowed_einsum_mib).
_WINDOWED_BYTES = 256 * 2**20
PIECES_IN_PLACE = 4
"""So many pieces the TPU compiler multiplies without a loop, and writes where they belong."""


def may_decompose(transfer: Transfer, machine: Machine) -> bool:
    """Whether a collective is of sums that some matmul may pass round in a ring, of three or more.

    Args:
        transfer: the collective.
        machine: the chips and links.
    """
    is_ring = transfer.kind == "reduce-scatter" and machine.links[transfer.axis].size > 2
    return is_ring and machine.decomposes_sums


def _is_decomposed(op: Op, choice: Choice, transfer: Transfer, machine: Machine) -> bool:
    """Whether the sums of a matmul go round in a ring while it makes them, behind its compute.

    The TPU compiler does a reduce-scatter so where that is the shorter: the longer of compute and
    ring, and what goes round before and after, against compute and collective one after the other.
    (XLA's `dot_handler.cc` has the formula.) It counts FLOPs and bytes alone, which grow alike with
    rows and columns, so that all depends on what a device contracts: in 9,935 of 10,061 sums of
    programs for v5e, prefill and decoding.
    """
    if not may_decompose(transfer, machine):
        return False
    chip, local = machine.chip, local_sizes(op, choice, machine.axis_sizes)
    contracted = op.window * math.prod(local[factor] for factor in op.reduced)
    multiplying = 2 * contracted / chip.flops_per_second(machine.matmul_dtype)
    moving = _RING_BYTES / (2 * _LINK_SHARE * chip.link_bytes_per_second)
    return multiplying > 2 / machine.links[transfer.axis].size * moving


def summed(
    op: Op, choice: Choice, transfer: Transfer, may_ring: bool, machine: Machine
) -> Transfer:
    """What the TPU compiler makes of a collective of a matmul.

    Args:
        op: the matmul.
        choice: the factor split over each axis, or `WHOLE`.
        transfer: the collective.
        may_ring: whether its sums may go round in a ring: whether no operand is gathered too, and
            no two devices do the same.
        machine: the chips and links.
    """
    if transfer.kind != "reduce-scatter":
        return transfer
    if may_ring and _is_decomposed(op, choice, transfer, machine):
        return _as_ring(op, choice, transfer, machine)
    whole = _is_summed_whole(op, choice, transfer, machine)
    return as_all_reduce(transfer, machine) if whole else transfer


def uses_all_devices(choice: Choice, axis_sizes: Sequence[int]) -> bool:
    """Whether no two devices do the same: where some do, no matmul compiled had a ring."""
    return all(factor != WHOLE for factor, n in zip(choice, axis_sizes, strict=True) if n > 1)


def _as_ring(op: Op, choice: Choice, transfer: Transfer, machine: Machine) -> Transfer:
    """A reduce-scatter whose sums go round while the matmul makes them."""
    (result,), n = op.results, machine.links[transfer.axis].size
    n_bytes = _RING_BYTES * transfer.n_bytes // result.itemsize
    passes = _RING_PASSES * n_bytes / machine.chip.hbm_bytes_per_second
    seconds = transfer.memory_seconds + max(passes, _RING_KERNELS * n / 2 * KERNEL_SECONDS)
    factor = result.factors[transfer.target[machine.axis_of(transfer.axis)]]
    seconds += _turning_seconds(op, choice, factor, n, machine)
    return replace(transfer, overlapped=True, in_ring=True, memory_seconds=seconds)


def _is_summed_whole(op: Op, choice: Choice, transfer: Transfer, machine: Machine) -> bool:
    """Whether the TPU compiler makes an all-reduce and a slice of this reduce-scatter of a matmul.

    It does where the shards are an odd number of lane tiles of two-byte elements wide, or what they
    are of is no whole number; and where they are heads, the last dimension but one of four, or the
    first of four. Seen in 500 of its programs for v5e; of matmuls in float32 the widths do not
    matter. It does too where rows of tiles make no even pieces: the gradient of `[4096, 151936]`,
    the vocabulary of Qwen in four, has 2 x 1187 of them.
    """
    (result,) = op.results
    dim, factors = transfer.target[machine.axis_of(transfer.axis)], result.factors
    factor = factors[dim]
    if factor is None:
        return False
    size = op.factor_sizes[factor]
    shard = size // machine.links[transfer.axis].size
    if len(factors) == 4 and (dim == 0 or dim == 2 and shard > 1):
        return True
    is_odd = shard % (2 * TILE_LANES) == TILE_LANES or cuts_tiles(size, 1)
    if is_odd and dim == len(factors) - 1 and result.itemsize < FLOAT32_BYTES:
        return True
    width = local_sizes(op, choice, machine.axis_sizes)[factor]
    n_bytes = local_bytes(result.n_bytes, layout_of(result, choice), machine.axis_sizes)
    return not _makes_even_pieces(n_bytes, width)


@cache
def _makes_even_pieces(n_bytes: int, width: int) -> bool:
    """Whether the rows of tiles of a sum make equal pieces of a size that is scattered.

    Args:
        n_bytes: of what a device adds up.
        width: elements along the lanes, the dimension that is scattered.
    """
    n_rows = n_bytes // (TILE_ROWS * FLOAT32_BYTES * width)
    fewest, most = math.ceil(n_bytes / _PIECE_BYTES[1]), n_bytes // _PIECE_BYTES[0]
    return most < 1 or any(n_rows % n == 0 for n in range(fewest, most + 1))


def windowed_dims(op: Op, array: Array, operand: int | None, machine: Machine) -> set[int]:
    """The dimensions along which a matmul may gather an array piece by piece.

    The array is an operand that the step makes. Along the contracted dimension, where there is one,
    TPU compilers that make rings do so if the result is larger than the operand; along others a
    matmul has to be large. For GPUs XLA's threshold is 100,000 MiB.
    """
    if op.kind != "contraction" or operand is None or array.is_held:
        return set()
    if machine.chip.kind == "gpu":
        return set()
    n_bytes = sum(result.n_bytes for result in op.results)
    if n_bytes >= _WINDOWED_BYTES:
        return set(range(len(array.factors)))
    is_plain = len(op.reduced) != 1 or op.is_convolution or n_bytes <= array.n_bytes
    if is_plain or not machine.decomposes_sums:
        return set()
    return {dim for dim, factor in enumerate(array.factors) if factor in op.reduced}


def windowed(
    op: Op,
    choice: Choice,
    layouts: Sequence[Layout],
    transfer: Transfer,
    compute: float,
    machine: Machine,
) -> Transfer:
    """A collective of an op: what a matmul gathers piece by piece so, others as they are.

    Of two devices the compiler makes the plain matmul, and where the other operand lies whole.

    Args:
        op: the matmul.
        choice: the factor split over each axis, or `WHOLE`.
        layouts: of each operand, then each result.
        transfer: one of its collectives.
        compute: seconds of the matmul.
        machine: the chips and links.
    """
    if transfer.kind != "all-gather" or transfer.operand is None:
        return transfer
    array, size = op.operands[transfer.operand], machine.links[transfer.axis].size
    axis = machine.axis_of(transfer.axis)
    others = (at for at in range(len(op.operands)) if at != transfer.operand)
    is_sliced = all(layouts[at][axis] == WHOLE for at in others)
    dim = layouts[transfer.operand][axis]
    if size <= 2 or is_sliced or dim not in windowed_dims(op, array, transfer.operand, machine):
        return transfer
    (result,), factor = op.results, array.factors[dim]
    n_bytes = local_bytes(result.n_bytes, layout_of(result, choice), machine.axis_sizes)
    is_contracted = factor in op.reduced
    seconds = _rewriting_seconds(machine, size, n_bytes, is_contracted, compute)
    if is_contracted:
        seconds += _turning_seconds(op, choice, factor, size, machine)
    return replace(transfer, pieces=size, adds_pieces=is_contracted, alone_seconds=seconds)


def _rewriting_seconds(
    machine: Machine, pieces: int, n_bytes: int, is_contracted: bool, compute: float
) -> float:
    """What a windowed matmul takes beside its compute to read and write its result again.

    Gathered along the contracted dimension, every further piece reads and writes the whole result
    once more; more than a few pieces go through a loop, two at a time, where that runs behind
    compute. Gathered along another dimension, each of more than a few pieces is written anew. By
    the cycles of 36 matmuls compiled for v5e, groups of two, four and eight, at XLA's default
    threshold. A result that stays in the vector memory costs no more than a kernel for every two
    pieces, as in ten models' matmuls below that threshold.
    """
    chip, few = machine.chip, pieces <= PIECES_IN_PLACE
    if few and not is_contracted:
        return 0.0
    stays = 2 * n_bytes <= machine.on_chip_bytes and pieces * n_bytes < _WINDOWED_BYTES
    if is_contracted and stays:
        return pieces / 2 * KERNEL_SECONDS
    if few or not is_contracted:
        return 2 * (pieces - 1) * n_bytes / chip.hbm_bytes_per_second
    n_steps = pieces // 2 if pieces % 2 == 0 else pieces
    return max(0.0, (n_steps + 1) * memory_seconds(chip, n_bytes, n_bytes) - compute)


def _turning_seconds(op: Op, choice: Choice, factor: int | None, n: int, machine: Machine) -> float:
    """What it takes to turn the weights round of which the loop of a ring takes slices.

    It is where slices cut tiles apart. Seen in programs for v5e that decode with Qwen 2.5: 448 of
    3,584 elements at a time, of the last dimension, or of the first where the last does not fill
    tiles (`[3584, 2368]`). A weight that is read transposed is turned by what transposes it (see
    `autoshard.cost.memory`).

    Args:
        op: the matmul.
        choice: the factor split over each axis, or `WHOLE`.
        factor: what the slices are of.
        n: how many of them there are.
        machine: the chips.
    """
    sizes = local_sizes(op, choice, machine.axis_sizes)
    if factor is None or n <= PIECES_IN_PLACE or not machine.compiles_for_tpu:
        return 0.0
    if not cuts_tiles(sizes[factor], n):
        return 0.0
    seconds = 0.0
    for array in op.operands:
        shape = [1 if own is None else sizes[own] for own in array.factors]
        if array.is_held and len(shape) == 2 and array.factors[innermost(shape)] == factor:
            n_elements = math.prod(round_up(size, TILE_LANES) for size in shape)
            seconds += turning_seconds(n_elements, n_elements * array.itemsize, machine)
    return seconds


def thinning(op: Op, layouts: Sequence[Layout], transfer: Transfer, machine: Machine) -> float:
    """Time of a convolution over that of the plain one, where the kernel goes round in a ring.

    The TPU compiler convolves with a slice of the channels at a time, and a slice narrower than the
    matrix unit's tile leaves the rest of it idle. Seen in programs of eight devices: kernels of 256
    channels, 3 x 3 and 1 x 1, took 3.6 times as long.
    """
    axis = machine.axis_of(transfer.axis)
    if transfer.kind == "all-gather" and transfer.operand is not None:
        array = op.operands[transfer.operand]
        dim = layouts[transfer.operand][axis]
    elif transfer.in_ring:
        array, dim = op.results[0], transfer.target[axis]
    else:
        return 1.0
    factor, tile = array.factors[dim], machine.chip.mxu_size
    if factor is None:
        return 1.0
    size, n = op.factor_sizes[factor], machine.links[transfer.axis].size
    return n * round_up(-(-size // n), tile) / round_up(size, tile)
