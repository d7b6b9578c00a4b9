"""Arrays that a TPU turns round: copies with their last two dimensions the other way.

A TPU holds arrays in tiles of 8 x 128, and its compiler keeps an argument whose last dimension does
not fill whole tiles the other way round, which needs less padding. By 21 copies of tables in its
programs a tile takes 24 to 25 cycles, of two and of four bytes an element alike, and 8 to 12 where
the copy finds place in the vector memory.
"""

import math
from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Choice, local_sizes
from autoshard.graph.program import Op
from autoshard.hardware.efficiency import TILE_LANES, TILE_ROWS, memory_seconds
from autoshard.mesh import round_up

__all__ = ["cuts_tiles", "ring_seconds", "turning_seconds"]

_TILE_CYCLES = 25
_TILE_CYCLES_ON_CHIP = 11


def turning_seconds(
    n_elements: float, n_bytes: float, machine: Machine, n_together: int = 1
) -> float:
    """What it takes a device to turn an array round.

    Args:
        n_elements: of its shard, padding included.
        n_bytes: of the same.
        machine: the chips.
        n_together: how many like it are turned at once.
    """
    chip = machine.chip
    if not chip.clock_hz:
        return memory_seconds(chip, n_bytes, n_bytes)
    fits = n_together * n_bytes <= machine.on_chip_bytes
    cycles = _TILE_CYCLES_ON_CHIP if fits else _TILE_CYCLES
    return n_elements / (TILE_ROWS * TILE_LANES) * cycles / chip.clock_hz


def cuts_tiles(size: int, n: int) -> bool:
    """Whether n slices of a dimension of some size on a device cut its tiles apart."""
    return size % (n * TILE_LANES) != 0


def ring_seconds(op: Op, choice: Choice, factor: int, n: int, machine: Machine) -> float:
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
    if not machine.compiles_for_tpu or not cuts_tiles(sizes[factor], n):
        return 0.0
    seconds = 0.0
    for array in op.operands:
        shape = [1 if own is None else sizes[own] for own in array.factors]
        if array.is_held and len(shape) == 2 and array.factors[_innermost(shape)] == factor:
            n_elements = math.prod(round_up(size, TILE_LANES) for size in shape)
            seconds += turning_seconds(n_elements, n_elements * array.itemsize, machine)
    return seconds


def _innermost(shape: Sequence[int]) -> int:
    """Which of two dimensions an argument has along the lanes of its tiles: what needs less room.

    >>> _innermost((3584, 2048)), _innermost((3584, 2368))
    (1, 0)
    """
    first, last = shape
    as_it_is = round_up(first, TILE_ROWS) * round_up(last, TILE_LANES)
    turned = round_up(first, TILE_LANES) * round_up(last, TILE_ROWS)
    return 0 if turned < as_it_is else 1
