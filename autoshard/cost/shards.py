"""How much of an array, or of an op, one device has."""

import math
from functools import cache

from autoshard.cost.machine import Machine
from autoshard.graph.program import WHOLE, Array, Layout, Op

__all__ = ["FLOAT32_BYTES", "Choice", "local_bytes", "local_sizes", "moved_bytes", "n_parts"]

Choice = tuple[int, ...]
"""The factor that an op splits over each axis, or `WHOLE`."""

FLOAT32_BYTES = 4
"""Of an element."""


def local_bytes(n_bytes: int, layout: Layout, axis_sizes: tuple[int, ...]) -> int:
    """Bytes of one device's shard."""
    return -(-n_bytes // n_parts(layout, axis_sizes))


@cache
def n_parts(layout: Layout, axis_sizes: tuple[int, ...]) -> int:
    """Into how many shards a layout cuts an array, or a choice an op."""
    return math.prod(n for dim, n in zip(layout, axis_sizes, strict=True) if dim != WHOLE)


def local_sizes(op: Op, choice: Choice, axis_sizes: tuple[int, ...]) -> list[int]:
    """What of each factor one device has."""
    local = list(op.factor_sizes)
    for factor, n in zip(choice, axis_sizes, strict=True):
        if factor != WHOLE:
            local[factor] = max(1, local[factor] // n)
    return local


def moved_bytes(op: Op, array: Array, machine: Machine) -> int:
    """Bytes of an array of an op, whole, as it is moved to it, or read and written by it.

    What a matmul reads in float32 TPU compilers round to bfloat16 first: at JAX's default precision
    it multiplies no more than that.
    """
    is_wide = op.kind == "contraction" and array.itemsize == FLOAT32_BYTES
    return array.n_bytes // 2 if machine.compiles_for_tpu and is_wide else array.n_bytes
