"""What one op adds to the cost of a step."""

from dataclasses import dataclass
from typing import NamedTuple

from autoshard.cost.memory import OpBytes
from autoshard.cost.transfers import Transfer, is_all_reduced
from autoshard.cost.values import Traffic

__all__ = ["Moved", "Share"]


class Moved(NamedTuple):
    """A collective of one op.

    Attributes:
        once: what makes it the same as another's.
        transfer: the op's.
        traffic: how the step counts it.
        beside: how it does where it runs beside another matmul; None where it cannot.
    """

    once: tuple[object, ...]
    transfer: Transfer
    traffic: Traffic
    beside: Traffic | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one op adds to the step, with some layouts around it.

    Attributes:
        compute_seconds: of all its runs.
        fetch_seconds: of its weights, in all its runs.
        moves: the collectives of one run.
        in_loop: whether its result is made piece by piece in a loop.
        moved_operands: by identity, and over which axis.
        n_bytes: what it adds to memory, see `PeakMemory.op_bytes`.
    """

    compute_seconds: float
    fetch_seconds: float
    moves: tuple[Moved, ...]
    in_loop: bool
    moved_operands: frozenset[tuple[int, int]]
    n_bytes: OpBytes

    @property
    def is_all_reduced(self) -> bool:
        """Whether an all-reduce sums what the op makes."""
        return is_all_reduced(moved.transfer for moved in self.moves)

    @property
    def moves_result(self) -> bool:
        """Whether what the op makes is summed over devices, or moved."""
        return any(moved.transfer.operand is None for moved in self.moves)
