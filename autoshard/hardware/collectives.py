"""What a collective costs: ring formulas and a latency term.

With `b` bytes in the full array at one device and a group of `g`, a ring sends through one device

    all-reduce            2 b (g-1) / g      b: the buffer
    all-gather            b (g-1) / g        b: the result
    reduce-scatter        b (g-1) / g        b: the input (g times the result)
    all-to-all            b (g-1) / g        b: the local buffer
    collective-permute    b                  b: the buffer

and takes

    seconds = wire bytes / link.bytes_per_second + g * link.latency_seconds + link.launch_seconds

On a ring used both ways that is the scaling book's `2 V / W` and `V / W` with the exact factor
`(g-1)/g`, plus 1 us a device on TPUs. An all-to-all on a torus passes through other devices: its
links carry `b floor(g^2/4) / g` bytes, the scaling book's `V / (4 W)`.

Left out: that small messages have a floor (8 us on a TPU of any size), that NVSwitch reduces
in the switch (about 1.3 times as fast for large all-reduces), and contention between collectives
that run at once.

Source: jax-ml/scaling-book, sharding.
"""

from autoshard.errors import UnknownNameError
from autoshard.hardware.links import AxisLink

__all__ = ["KINDS", "seconds", "wire_bytes"]

_FACTORS = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
}
KINDS = (*_FACTORS, "collective-permute")


def wire_bytes(kind: str, n_bytes: float, group_size: int) -> float:
    """Bytes that one device sends in a collective by the ring formulas.

    Args:
        kind: one of `KINDS`.
        n_bytes: bytes of the full array at one device (all-reduce, permute, all-to-all: the local
            buffer; all-gather: the result; reduce-scatter: the input).
        group_size: devices that take part, at least 1.

    Raises:
        UnknownNameError: no such collective.

    >>> wire_bytes("all-reduce", 800, 8), wire_bytes("all-gather", 800, 8)
    (1400.0, 700.0)
    """
    if kind not in KINDS:
        raise UnknownNameError("collective", kind, KINDS)
    if group_size == 1:
        return 0.0
    if kind == "collective-permute":
        return float(n_bytes)
    return _FACTORS[kind] * n_bytes * (group_size - 1) / group_size


def seconds(kind: str, n_bytes: float, link: AxisLink) -> float:
    """Seconds of a collective over a link, by the formula in the module's docstring.

    Args:
        kind: one of `KINDS`.
        n_bytes: as for `wire_bytes`.
        link: what carries it; its size is the group's.

    Raises:
        UnknownNameError: no such collective.
    """
    traffic = wire_bytes(kind, n_bytes, link.size)
    if link.size == 1:
        return 0.0
    if kind == "all-to-all" and link.kind.startswith("torus"):
        traffic = n_bytes * (link.size**2 // 4) / link.size
    return traffic / link.bytes_per_second + link.size * link.latency_seconds + link.launch_seconds
