"""What of a device's peak a matrix multiplication `[m, k] x [k, n]` reaches.

    efficiency = 2 m k n / peak / seconds
    seconds    = 2 pad(min(m,n), 8) pad(k, t) pad(max(m,n), t) / (peak * efficiency_max) + overhead

`pad(d, t)` rounds up to a multiple of `t`, the edge of the matrix unit's tile: it holds a `t x t`
tile of one operand while the other streams past in rows of 8, so `k` and the longer of `m` and `n`
fill it in whole tiles. `overhead` is what filling and draining cost whatever the size. So a shard
that a mesh axis made small pays twice. Memory is not in it: take the larger of this and
`memory_seconds`.

`efficiency_max` and `overhead` of TPUs are fitted to the cycles that the TPU compiler estimates for
25 shapes (1 to 4096 rows): with the memory term within a third for most of them where operands
come from HBM, and several times too slow where the compiler had fetched an operand ahead. Those
of GPUs are the best matmuls measured and XLA's launch time.
"""

from autoshard.hardware.chips import Chip
from autoshard.mesh import round_up

__all__ = [
    "KERNEL_SECONDS",
    "ON_CHIP_SHARE",
    "TILE_LANES",
    "TILE_ROWS",
    "matmul_efficiency",
    "memory_seconds",
]

TILE_ROWS, TILE_LANES = 8, 128
"""A tile of a TPU's vector memory."""

KERNEL_SECONDS = 1.25e-6
"""No kernel of a TPU takes less: 1.2 to 1.3 us in five programs for v5e that decode."""

ON_CHIP_SHARE = 0.75
"""So much of a core's vector memory the TPU compiler fills. Seen in its programs for v5e, of 128
MiB: of what is alive up to 100 MB do not show in the main memory. Arrays of 50 to 100 MB lie there
about as often as not, whatever they are."""


def matmul_efficiency(chip: Chip, m: int, k: int, n: int, dtype: str = "bfloat16") -> float:
    """Fraction of the peak, in (0, 1), of one device's share of a matrix multiplication.

    Args:
        chip: the chip.
        m: rows of the left operand on one device, batch dimensions that share `n` included.
        k: the contracted dimension.
        n: columns of the right operand.
        dtype: of the operands.

    >>> from autoshard.hardware.chips import get_chip
    >>> v5e = get_chip("tpu:v5e")
    >>> [round(matmul_efficiency(v5e, size, size, size), 2) for size in (256, 1024, 4096)]
    [0.06, 0.8, 0.98]
    """
    peak, tile = chip.flops_per_second(dtype), chip.mxu_size
    padded = round_up(min(m, n), TILE_ROWS) * round_up(k, tile) * round_up(max(m, n), tile)
    ideal = 2 * m * k * n / peak
    taken = 2 * padded / (peak * chip.matmul_efficiency_max) + chip.matmul_overhead_seconds
    return ideal / taken


def memory_seconds(chip: Chip, read_bytes: float, written_bytes: float) -> float:
    """Seconds that HBM takes to read and write so many bytes of one device.

    Reading and writing differ: the TPU compiler counts on about 0.8 of the nominal bandwidth for
    what a program reads and 0.3 for what it writes.

    Args:
        chip: the chip.
        read_bytes: bytes read.
        written_bytes: bytes written.
    """
    reading = read_bytes / chip.hbm_read_efficiency
    writing = written_bytes / chip.hbm_write_efficiency
    return (reading + writing) / chip.hbm_bytes_per_second
