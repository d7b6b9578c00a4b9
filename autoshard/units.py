"""Quantities as people read and write them: bytes, seconds, counts.

Inside the package every quantity is SI in its base unit (bytes, seconds, FLOPs); these functions
stand at the border.
"""

import re
from collections.abc import Sequence
from operator import index
from typing import TypeVar

from autoshard.errors import UsageError

__all__ = [
    "format_bytes",
    "format_count",
    "format_flops",
    "format_seconds",
    "option_bytes",
    "parse_bytes",
    "spell_count",
    "whole_number",
]

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTE_UNITS = (
    ("TiB", 2**40, 2), ("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1), ("B", 1, 0),
)  # fmt: skip
_SECOND_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
_COUNT_WORDS = (("trillion", 10**12, 2), ("billion", 10**9, 2), ("million", 10**6, 2))
_FLOP_UNITS = (
    ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6),
    ("kFLOP", 1e3), ("FLOP", 1.0),
)  # fmt: skip
_BYTES = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)


_Whole = TypeVar("_Whole", int, int | None)


def whole_number(name: str, number: _Whole) -> _Whole:
    """A number that a caller gave, NumPy's and JAX's as Python's own; None where it gave none.

    Args:
        name: what it is called.
        number: the number.

    Raises:
        UsageError: it is not whole.
    """
    if number is None:
        return number
    try:
        if isinstance(number, bool):
            raise TypeError
        return index(number)
    except TypeError:
        raise UsageError(f"{name} is {number!r}; give a whole number") from None


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

    >>> [format_bytes(n) for n in (0, 512, 1536, 2**30 - 1, 16911433728)]
    ['0 B', '512 B', '1.5 KiB', '1.00 GiB', '15.75 GiB']
    """
    return _fixed_digits(n_bytes, _BYTE_UNITS) or "0 B"


def option_bytes(n_bytes: int) -> str:
    """Write an amount of memory as an option takes it: no less than it is, and hardly more.

    >>> option_bytes(1536), option_bytes(45325897868)
    ('2KiB', '43227MiB')
    """
    size, unit = (2**10, "KiB") if n_bytes < 2**26 else (2**20, "MiB")
    return f"{-(-n_bytes // size)}{unit}"


def format_seconds(seconds: float) -> str:
    """Print a duration with three significant digits, or in whole seconds.

    >>> [format_seconds(s) for s in (0, 2.5e-6, 0.01234, 0.9996, 95.5, 999.6)]
    ['0 s', '2.5 us', '12.3 ms', '1 s', '95.5 s', '1000 s']
    """
    return _three_digits(seconds, _SECOND_UNITS) or "0 s"


def format_count(count: float) -> str:
    """Print a number of parameters with its word.

    >>> [format_count(n) for n in (512, 1363968, 999_999_999, 8537680896)]
    ['512', '1.36 million', '1.00 billion', '8.54 billion']
    """
    return _fixed_digits(count, _COUNT_WORDS) or f"{count:,.0f}"


def spell_count(count: int, of: str, *more: str) -> str:
    """Print a number to the last digit, with its word where it has one and what else is to be said.

    >>> spell_count(8537680896, "parameters", "15.90 GiB"), spell_count(512, "parameters")
    ('8,537,680,896 parameters (8.54 billion, 15.90 GiB)', '512 parameters')
    """
    said = (*([format_count(count)] if count >= _COUNT_WORDS[-1][1] else []), *more)
    return f"{count:,} {of}" + (f" ({', '.join(said)})" if said else "")


def format_flops(flops: float) -> str:
    """Print a number of floating point operations.

    >>> [format_flops(n) for n in (0, 512, 9.996e11, 2.1e13, 1.7e18)]
    ['0 FLOP', '512 FLOP', '1 TFLOP', '21 TFLOP', '1.7 EFLOP']
    """
    return _three_digits(flops, _FLOP_UNITS) or "0 FLOP"


def _fixed_digits(amount: float, units: Sequence[tuple[str, int, int]]) -> str:
    """An amount in the largest unit of which it is one or more, once rounded; "" below all."""
    for unit, size, digits in units:
        rounded = f"{amount / size:.{digits}f}"
        if abs(float(rounded)) >= 1:
            return f"{rounded} {unit}"
    return ""


def _three_digits(amount: float, units: Sequence[tuple[str, float]]) -> str:
    """An amount in the largest unit of which it is one or more, once rounded; "" for nothing."""
    rounded = float(f"{amount:.3g}")
    if abs(rounded) >= 1000 * units[0][1]:
        return f"{amount / units[0][1]:.0f} {units[0][0]}"
    for unit, size in units:
        if abs(rounded) >= size * (1 - 1e-12):
            return f"{rounded / size:.3g} {unit}"
    return f"{rounded / units[-1][1]:.3g} {units[-1][0]}" if rounded else ""
