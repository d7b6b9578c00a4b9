"""What returning a matmul's result costs a TPU beside the matmul: a copy into another order.

A program returns an array in the order of dimensions that needs the least padding to tiles of
8 x 128, where a short second dimension makes shorter tiles. A matmul writes its batch outermost. So
logits `[8, 512, 50257]` are written as `{1,2,0}`, which pads 50257 to tiles of 8, and copied into
`{1,0,2}`, which pads nothing; those of a vocabulary that divides by 8 are not.

A tile of so many rows takes `10 + rows` cycles: within 4% of what the TPU compiler estimates for 12
shapes of two and four bytes an element on v5e, a fifth too much where it makes the matmul's result
in vector memory. Writing the copy to main memory may take longer.
"""

import itertools
from collections.abc import Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.shards import local_bytes
from autoshard.cost.transposing import padded_elements, tile_rows
from autoshard.graph.program import WHOLE, Array, Layout, Op, Program
from autoshard.hardware.efficiency import TILE_LANES, memory_seconds

__all__ = ["ResultCopies", "copied_tiles"]

_TILE_CYCLES = 10


class ResultCopies:
    """The copies of what a program's matmuls make for its results, on one machine."""

    def __init__(self, program: Program, machine: Machine) -> None:
        self._program = program
        self._machine = machine
        returned = [op for op in program.ops if op.is_returned]
        self._returned = {array.identity for op in returned for array in op.results} | {
            op.operands[0].identity for op in returned if op.kind == "slice" and op.is_fused
        }

    def is_returned(self, array: Array) -> bool:
        """Whether an array is one of the results, or one in other form, or one is a slice of it."""
        return array.identity in self._returned

    def n_bytes(self, op: Op, layout: Layout) -> int:
        """Bytes of one device's copy; 0 where there is none.

        Args:
            op: one of the program's.
            layout: that of its result.
        """
        if self._tiles(op, layout) is None:
            return 0
        return local_bytes(op.results[0].n_bytes, layout, self._machine.axis_sizes)

    def seconds(self, op: Op, layout: Layout) -> float:
        """What the copy takes; arguments as for `n_bytes`."""
        tiles, chip = self._tiles(op, layout), self._machine.chip
        if tiles is None or not chip.clock_hz:
            return 0.0
        n_tiles, rows = tiles
        n_bytes = local_bytes(op.results[0].n_bytes, layout, self._machine.axis_sizes)
        return max(
            n_tiles * (_TILE_CYCLES + rows) / chip.clock_hz,
            memory_seconds(chip, n_bytes, n_bytes),
        )

    def _tiles(self, op: Op, layout: Layout) -> tuple[int, int] | None:
        """Tiles of a device's copy and rows of each, or None where there is no copy."""
        if op.kind != "contraction" or op.is_convolution or self._machine.chip.kind != "tpu":
            return None
        if op.slicing is not None or not any(map(self.is_returned, op.results)):
            return None
        result = op.results[0]
        shape = list(self._program.groups[result.group].sizes)
        for dim, size in zip(layout, self._machine.axis_sizes, strict=True):
            if dim != WHOLE:
                shape[dim] = -(-shape[dim] // size)
        return copied_tiles([size for size in shape if size > 1])


def copied_tiles(shape: Sequence[int]) -> tuple[int, int] | None:
    """Into how many tiles, and of how many rows, a matmul's result of some shape is copied.

    Args:
        shape: of one device's result, the batch first, without dimensions of size 1.

    Returns:
        None where it is returned as it is, and of any but three dimensions.

    >>> copied_tiles([8, 512, 50257])
    (201028, 8)
    >>> copied_tiles([8, 512, 50264]) is None
    True
    """
    if len(shape) != 3:
        return None
    best = min(
        itertools.permutations(range(3), 2), key=lambda order: padded_elements(shape, *order)
    )
    written = min(padded_elements(shape, 1, 2), padded_elements(shape, 2, 1))
    if padded_elements(shape, *best) == written:
        return None
    rows = tile_rows(shape[best[1]])
    return padded_elements(shape, *best) // (rows * TILE_LANES), rows
