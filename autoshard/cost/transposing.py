"""Arrays that a TPU turns round: copies with their last two dimensions the other way.

A TPU holds arrays in tiles of 8 x 128, and its compiler keeps an argument whose last dimension does
not fill whole tiles the other way round, which needs less padding. By 21 copies of tables in its
programs a tile takes 24 to 25 cycles, of two and of four bytes an element alike, and 8 to 12 where
the copy finds place in the vector memory.
"""

import math
from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.hardware.efficiency import TILE_LANES, TILE_ROWS, memory_seconds
from autoshard.mesh import round_up

__all__ = ["cuts_tiles", "innermost", "padded_elements", "tile_rows", "turning_seconds"]

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


def innermost(shape: Sequence[int]) -> int:
    """Which of two dimensions an argument has along the lanes of its tiles: what needs less room.

    >>> innermost((3584, 2048)), innermost((3584, 2368))
    (1, 0)
    """
    return 0 if padded_elements(shape, 0, 1) < padded_elements(shape, 1, 0) else 1


def padded_elements(shape: Sequence[int], minor: int, second: int) -> int:
    """Elements of an array whose two innermost dimensions fill whole tiles."""
    others = math.prod(size for dim, size in enumerate(shape) if dim not in (minor, second))
    rows = tile_rows(shape[second])
    return others * round_up(shape[second], rows) * round_up(shape[minor], TILE_LANES)


def tile_rows(size: int) -> int:
    """Rows of a tile across a dimension."""
    return min(TILE_ROWS, 1 << (size - 1).bit_length())
