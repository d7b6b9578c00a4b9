"""Norms of rows that devices share, on a TPU.

What is made of a row and its sum comes after the sum over devices, and goes through the row once
more. A matmul that makes the row, or the last part of it, adds it up as it writes: then that takes
no time of its own, unless its result has to be summed or moved first.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from autoshard.cost.machine import Machine
from autoshard.cost.op_shares import Share
from autoshard.graph.program import Op, Program
from autoshard.graph.softmaxes import read_softmaxes

__all__ = ["SharedNorms"]


class _Norm(NamedTuple):
    """Index of a norm's first sum, and of the matmul that makes the last of what it adds up."""

    sums: int
    maker: int | None


class SharedNorms:
    """The norms of a step's forward half.

    Args:
        program: the step.
        machine: what it runs on.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._norms = tuple(_norms(program.ops)) if machine.compiles_for_tpu else ()

    def seconds(self, moving: Mapping[int, Share], moved: Collection[int]) -> float:
        """What it takes to go through rows once more.

        Args:
            moving: the ops that move something, with what they add.
            moved: those whose results a rule moves.
        """
        return sum(
            moving[sums].compute_seconds
            for sums, maker in self._norms
            if sums in moving
            and moving[sums].is_all_reduced
            and not _is_added_up(maker, moving, moved)
        )


def _norms(ops: Sequence[Op]) -> Iterator[_Norm]:
    softmaxes = {softmax.sums for softmax in read_softmaxes(ops)}
    made_by: dict[int, int] = {}
    seen: set[tuple[str, int]] = set()
    for index, op in enumerate(ops):
        if op.kind == "contraction" and op.results:
            made_by[op.results[0].group] = index
        if op.primitive != "reduce_sum" or op.backward or index in softmaxes:
            continue
        group = op.operands[0].group
        if (op.layer, group) not in seen:  # of a mean and a variance the first
            seen.add((op.layer, group))
            yield _Norm(index, made_by.get(group))


def _is_added_up(maker: int | None, moving: Mapping[int, Share], moved: Collection[int]) -> bool:
    """Whether a matmul adds up what it makes."""
    if maker is None or maker in moved:
        return False
    return maker not in moving or not moving[maker].moves_result
