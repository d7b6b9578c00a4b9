"""Quantities as people read and write them: bytes, seconds, counts.

Inside the package every quantity is SI in its base unit (bytes, seconds, FLOPs); these functions
stand at the border.
"""

import re

from autoshard.errors import UsageError

__all__ = ["format_bytes", "format_count", "format_flops", "format_seconds", "parse_bytes"]

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: a number with an optional unit: `15GiB`, `16 GB`, `2.5g`, `1000`.

    Raises:
        UsageError: the text is not an amount of memory above zero.

    >>> parse_bytes("15GiB"), parse_bytes("1.5 GB"), parse_bytes("4096")
    (16106127360, 1500000000, 4096)
    """
    match = _BYTES.fullmatch(text)
    n_bytes = 0
    if match:
        prefix = match[2].lower()
        n_bytes = round(float(match[1]) * (_DECIMAL | _BINARY)[prefix])
    if n_bytes <= 0:
        raise UsageError(f"'{text}' is not an amount of memory; write one like 15GiB or 16GB")
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """Print an amount of memory in the binary unit that leaves at least one digit.

    >>> [format_bytes(n) for n in (0, 512, 1536, 16911433728)]
    ['0 B', '512 B', '1.5 KiB', '15.75 GiB']
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= size:
            digits = 2 if unit in ("GiB", "TiB") else 1
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Print a duration with three significant digits, or in whole seconds.

    >>> [format_seconds(s) for s in (0, 2.5e-6, 0.01234, 0.9996, 95.5, 999.6)]
    ['0 s', '2.5 us', '12.3 ms', '1 s', '95.5 s', '1000 s']
    """
    rounded = float(f"{seconds:.3g}")
    if abs(rounded) >= 1000:
        return f"{seconds:.0f} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def format_count(count: float) -> str:
    """Print a number of parameters with its word.

    >>> [format_count(n) for n in (512, 1363968, 8537680896)]
    ['512', '1.36 million', '8.54 billion']
    """
    for word, size in (("trillion", 10**12), ("billion", 10**9), ("million", 10**6)):
        if abs(count) >= size:
            return f"{count / size:.2f} {word}"
    return f"{count:,.0f}"


def format_flops(flops: float) -> str:
    """Print a number of floating point operations.

    >>> [format_flops(n) for n in (512, 2.1e13, 1.7e18)]
    ['512 FLOP', '21 TFLOP', '1.7 EFLOP']
    """
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(flops) >= size:
            return f"{flops / size:.3g} {prefix}FLOP"
    return f"{flops:.0f} FLOP"
