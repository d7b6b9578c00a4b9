"""What the optimizer's updates cost: passes over weights, gradients and slots in memory.

A trained weight is read and written by its update, and its gradient read; a slot is read and
written. A TPU makes the update in the matmul that makes the gradient, as it writes, where

- that matmul alone makes the gradient, and not piece by piece;
- nothing moves it: it lies as the weight does;
- the update is made of it element by element, as those of SGD, Adam and Lion are, and those of
  Adafactor and Muon are not.

Then it reads and writes no gradient, and hides most of the update of what fits the vector memory.
(`autoshard.cost.memory` counts a gradient all the same.)
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from autoshard.cost.lifetimes import gradient_groups
from autoshard.cost.machine import Machine
from autoshard.cost.op_shares import Share
from autoshard.graph.program import Argument, Layout, Program

__all__ = ["Updates"]


class _Times(NamedTuple):
    """The time of an update over that of its bytes at the nominal bandwidth.

    Attributes:
        small: of a shard that fits the vector memory.
        large: of one that does not.
    """

    small: float
    large: float


# In programs for v5e: of 14 updates of small shards 1.0 to 1.6, of two of 131 MB each 1.6.
_APART = _Times(small=1.3, large=1.6)

# What is added to a matmul that makes the update too: of 20 small shards in four programs for v5e
# 0.1 to 0.5, of a table of 131 MB all of it.
_FUSED = _Times(small=0.25, large=1.0)

# What may be done to a gradient on its way into an update.
_BY_ELEMENT = frozenset({"broadcast", "elementwise"})


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

    def made_together(self, arguments: Iterable[Argument]) -> list[tuple[Argument, ...]]:
        """Some arguments, a weight and its slots together where one matmul may change them all."""
        together: dict[object, list[Argument]] = {}
        for place, argument in enumerate(arguments):
            together.setdefault(self._makers.get(argument.group, place), []).append(argument)
        return list(map(tuple, together.values()))

    def is_fused(
        self,
        argument: Argument,
        laid: Collection[Layout],
        layouts: Sequence[Layout],
        moving: Mapping[int, Share],
    ) -> bool:
        """Whether that matmul makes the update too.

        Args:
            argument: one of the program's.
            laid: the layouts of those that are changed together with it, and its own.
            layouts: one a group.
            moving: the ops that move something, with what they add.
        """
        maker = self._makers.get(argument.group)
        if maker is None or any(layout != layouts[maker.gradient] for layout in laid):
            return False
        share = moving.get(maker.matmul)
        return share is None or not (share.in_loop or share.moves_result)

    def seconds(self, argument: Argument, n_bytes: int, *, is_fused: bool) -> float:
        """Seconds that the update of one argument's shard takes once.

        Args:
            argument: one of the program's.
            n_bytes: of the device's shard.
            is_fused: whether the matmul of its gradient makes it.
        """
        passed, machine = n_bytes * _passes(argument, is_fused=is_fused), self._machine
        seconds = passed / machine.chip.hbm_bytes_per_second
        if not machine.compiles_for_tpu:
            return seconds
        times = _FUSED if is_fused else _APART
        return seconds * (times.small if machine.keeps_on_chip(n_bytes) else times.large)

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
    gradients = gradient_groups(program)
    made: dict[int, list[int]] = {}
    read_whole = set[int]()
    for index, op in enumerate(program.ops):
        if op.kind in _BY_ELEMENT:
            continue
        read_whole.update(array.group for array in op.operands)
        if op.backward and op.results:
            made.setdefault(op.results[0].group, []).append(index)
    return {
        changed: _Maker(made[gradient][0], gradient)
        for changed, gradient in gradients.items()
        if len(made.get(gradient, ())) == 1
        and program.ops[made[gradient][0]].kind == "contraction"
        and gradient not in read_whole
    }
