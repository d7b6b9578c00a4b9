"""What the optimizer's updates cost: passes over weights, gradients and slots in memory.

A trained weight is read and written by its update, and its gradient read; a slot is read and
written. A TPU makes the update in the matmul that makes the gradient, as it writes, where one
matmul alone makes that and nothing moves it; then the gradient is never in memory, and the matmul
hides most of the update of what fits the vector memory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autoshard.cost.machine import Machine
from autoshard.cost.shares import Share
from autoshard.graph.liveness import FUSED
from autoshard.graph.program import Argument, Layout, Program

__all__ = ["Updates"]

# The time of a TPU's update over that of its bytes at the nominal bandwidth, by whether the shard
# fits the vector memory. By the cycles of 16 updates in programs for v5e 1.0 to 1.6 and 1.6.
_APART = {True: 1.3, False: 1.6}

# What is added to a matmul that makes the update too, over the same: by 20 matmuls in four
# programs for v5e 0.1 to 0.5 where the shard fits, and all of it for a table of 131 MB.
_FUSED = {True: 0.25, False: 1.0}


class _Maker(NamedTuple):
    """Index of the matmul that alone makes a gradient, and the gradient's group."""

    matmul: int
    gradient: int


class Updates:
    """The updates of a step.

    Args:
        program: the step.
        machine: what it runs on.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self._machine = machine
        self._makers = _makers(program) if machine.compiles_for_tpu else {}

    def may_be_fused(self, argument: Argument) -> bool:
        """Whether one matmul alone makes the gradient that changes an argument."""
        return argument.group in self._makers

    def is_fused(
        self, argument: Argument, layouts: Sequence[Layout], moving: Mapping[int, Share]
    ) -> bool:
        """Whether that matmul makes the update too.

        Args:
            argument: one of the program's.
            layouts: one a group.
            moving: the ops that move something, with what they add.
        """
        maker = self._makers.get(argument.group)
        if maker is None or layouts[maker.gradient] != layouts[argument.group]:
            return False
        return maker.matmul not in moving or not moving[maker.matmul].moves_result

    def seconds(self, argument: Argument, n_bytes: int, *, is_fused: bool) -> float:
        """What the update of one argument takes a device.

        Args:
            argument: one of the program's.
            n_bytes: of the device's shard.
            is_fused: whether the matmul of its gradient makes it.
        """
        passed, machine = n_bytes * _passes(argument, is_fused=is_fused), self._machine
        seconds = passed / machine.chip.hbm_bytes_per_second
        if not machine.compiles_for_tpu:
            return seconds
        return seconds * (_FUSED if is_fused else _APART)[n_bytes <= machine.on_chip_bytes]

    @staticmethod
    def changes(argument: Argument) -> bool:
        """Whether there is an update of an argument."""
        return _passes(argument, is_fused=True) > 0


def _passes(argument: Argument, *, is_fused: bool) -> int:
    """How often an update passes over an argument's bytes, its gradient's among them."""
    if not argument.donated:
        return 0
    if argument.role == "slot":
        return 2
    return (2 if is_fused else 3) * (argument.role == "weight" and argument.trainable)


def _makers(program: Program) -> dict[int, _Maker]:
    """Group of a weight or a slot -> what makes the gradient that changes it."""
    changed = {argument.group for argument in program.arguments if argument.donated}
    gradients = {group: group for group in changed}
    for op in program.ops:
        if op.kind == "elementwise" and op.results and op.results[0].group in changed:
            gradients[op.results[0].group] = op.operands[0].group
    made = [
        (op.results[0].group, index, op.kind)
        for index, op in enumerate(program.ops)
        if op.backward and op.results and op.kind not in FUSED
    ]
    n_makers = Counter(group for group, *_ in made)
    matmuls = {group: index for group, index, kind in made if kind == "contraction"}
    return {
        group: _Maker(matmuls[gradient], gradient)
        for group, gradient in gradients.items()
        if gradient in matmuls and n_makers[gradient] == 1
    }
