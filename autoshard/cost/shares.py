"""What one op adds to the cost of a step."""

from dataclasses import dataclass

from autoshard.cost.memory import OpBytes
from autoshard.cost.transfers import Transfer, is_all_reduced
from autoshard.cost.values import Traffic

__all__ = ["Moved", "Share"]

Moved = tuple[tuple[object, ...], Transfer, Traffic, Traffic | None]
"""What makes a collective the same as another's, the transfer of one op, how the step counts it,
and how it does where it runs beside another matmul (None where it cannot)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one op adds to the step, with some layouts around it.

    Attributes:
        compute_seconds: of all its runs.
        fetch_seconds: of its weights, in all its runs.
        transfers: of one run, each with what makes it the same as another's and how it counts.
        in_loop: whether its result is made piece by piece in a loop.
        moved: the operands that it moves, and over which axis.
        n_bytes: what it adds to memory, see `PeakMemory.op_bytes`.
    """

    compute_seconds: float
    fetch_seconds: float
    transfers: tuple[Moved, ...]
    in_loop: bool
    moved: frozenset[tuple[int, int]]
    n_bytes: OpBytes

    @property
    def is_all_reduced(self) -> bool:
        """Whether an all-reduce sums what the op makes."""
        return is_all_reduced(transfer for _, transfer, *_ in self.transfers)

    @property
    def moves_result(self) -> bool:
        """Whether what the op makes is summed over devices, or moved."""
        return any(transfer.operand is None for _, transfer, *_ in self.transfers)
