"""Spreads the layouts of the arguments through a program, as XLA's partitioner does.

A simulation of Shardy's propagation (https://openxla.org/shardy/propagation) on groups of arrays:
the layout of every argument is fixed; through each op, a factor split in one array is split in the
others, as `autoshard.graph.turns` has it, level by level, each until nothing changes. Where a rule
asks for a layer's output, that one array is laid out so, and its group may lie otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np

from autoshard.graph.program import WHOLE, LayerOutput, Layout, Program
from autoshard.graph.splits import factors_split
from autoshard.graph.turns import LEVELS, begins, has_more, may_tear, may_turn, spread, spread_look

__all__ = ["Apart", "Propagator", "picker", "propagate", "torn_axes"]

# The level at which matmuls have their first turn.
_TEARING = 1

_T = TypeVar("_T")

# The number of a layout, in the order in which they are met; of whole arrays it is 0.
_Number = int
_ALL_WHOLE = 0

# Positions among the arrays of an op, and the numbers of the layouts that those get; None where
# neither this level nor a later one changes anything.
_Changes = tuple[tuple[int, _Number], ...] | None
_NOT_KNOWN: _Changes = ((-1, _ALL_WHOLE),)


def propagate(
    program: Program,
    fixed: Mapping[int, Layout],
    axis_sizes: Sequence[int],
    asked: Sequence[tuple[LayerOutput, Layout]] = (),
) -> tuple[Layout, ...]:
    """Lay out every group, once; see `Propagator`."""
    return Propagator(program, axis_sizes).propagate(fixed, asked)


def picker(groups: Sequence[int]) -> Callable[[Sequence[_T]], tuple[_T, ...]]:
    """What picks the entries of some groups out of those of all, as fast as Python can."""
    if len(groups) == 1:
        (group,) = groups
        return lambda entries: (entries[group],)
    return itemgetter(*groups)


@dataclass(slots=True)
class Apart:
    """Where single arrays lie otherwise than their groups.

    Attributes:
        torn: matmuls whose results met others of their groups that were laid out before -> the
            layouts that their operands alone gave them then.
        around: index of an op -> the layouts around it, where a rule asked for one of them.
        moved: index of a matmul whose result is moved at once, to where a rule asks for it or from
            there -> the layouts before and after.
    """

    torn: dict[int, Layout] = field(default_factory=dict)
    around: dict[int, tuple[Layout, ...]] = field(default_factory=dict)
    moved: dict[int, tuple[Layout, Layout]] = field(default_factory=dict)

    def told(self) -> tuple[tuple[tuple[int, Any], ...], ...]:
        """The same as a value that can be a key."""
        return tuple(tuple(sorted(one.items())) for one in (self.torn, self.around, self.moved))


class Propagator:
    """Propagates many layouts through one program.

    What one op makes of the layouts around it is remembered, and ops that look alike (those of
    different blocks do) share it, so that further layouts cost a table lookup an op. Layouts are
    numbered: tuples of small integers are hashed faster.

    Args:
        program: the step.
        axis_sizes: devices along each mesh axis.

    Attributes:
        apart: of the layouts spread last, what lies otherwise than its group.
    """

    def __init__(self, program: Program, axis_sizes: Sequence[int]) -> None:
        self.apart = Apart()
        self._layouts: list[Layout] = []
        self._numbers: dict[Layout, _Number] = {}
        self._number((WHOLE,) * len(axis_sizes))
        self._meets = bytearray(map(may_tear, program.ops))
        self._program = program
        self._axis_sizes = tuple(axis_sizes)
        self._touching = program.touching()
        # By identity and group of an array: the ops that read it, and at which position.
        self._reads: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, op in enumerate(program.ops):
            for position, array in enumerate(op.operands):
                self._reads.setdefault((array.identity, array.group), []).append((index, position))
        self._groups_of = [op.groups for op in program.ops]
        self._around = [picker(groups) for groups in self._groups_of]
        levels = range(LEVELS)
        self._may = [bytearray(may_turn(op, level) for op in program.ops) for level in levels]
        self._begins = [bytearray(begins(op, level) for op in program.ops) for level in levels]
        self._new = [
            np.array(
                [may_turn(op, level) and has_more(op, level) for op in program.ops], dtype=bool
            )
            for level in levels
        ]
        # By level and op: the numbers of the layouts around it -> what it changes; one table for
        # each look.
        looks = [spread_look(op, program) for op in program.ops]
        self._spreads: list[list[dict[tuple[_Number, ...], _Changes]]] = []
        for _ in range(LEVELS):
            tables: dict[object, dict[tuple[_Number, ...], _Changes]] = {look: {} for look in looks}
            self._spreads.append([tables[look] for look in looks])

    def _number(self, layout: Layout) -> _Number:
        number = self._numbers.setdefault(layout, len(self._layouts))
        if number == len(self._layouts):
            self._layouts.append(layout)
        return number

    def propagate(
        self,
        fixed: Mapping[int, Layout],
        asked: Sequence[tuple[LayerOutput, Layout]] = (),
    ) -> tuple[Layout, ...]:
        """Lay out every group.

        Args:
            fixed: group -> layout, for the groups of arguments.
            asked: outputs and their gradients, and the layouts that rules ask of them. What is made
                of those may be split further.

        Returns:
            One layout a group; a group that nothing reaches is whole on every device.
        """
        whole = self._layouts[_ALL_WHOLE]
        known: dict[int, Layout] = {}
        for output, layout in asked:
            begun = known.get(output.group, whole)
            known[output.group] = tuple(
                new if old == WHOLE else old for old, new in zip(begun, layout, strict=True)
            )
        known |= fixed
        state = [_ALL_WHOLE] * len(self._program.groups)
        # An op is settled where nothing comes of it any more, as where all around it is whole.
        unsettled = bytearray(len(self._around))
        for group, layout in known.items():
            if layout != whole:
                state[group] = self._number(layout)
                for index in self._touching[group]:
                    unsettled[index] = True
        self.apart = Apart()
        if self._axis_sizes:
            wanted = self._wanted_arrays(asked)
            for level in range(LEVELS):
                self._run_level(level, state, fixed, wanted, unsettled)
        laid = tuple(map(self._layouts.__getitem__, state))
        self.apart.torn = {
            index: own
            for index, own in self.apart.torn.items()
            if self._groups_of[index][-1] not in known
        }
        made: dict[int, list[tuple[LayerOutput, Layout]]] = {}
        for output, layout in asked:
            if output.made_by is not None:
                made.setdefault(output.made_by, []).append((output, layout))
        for index, outputs in made.items():
            # Where something that is priced by itself is between, that is laid out as asked.
            if self._groups_of[index][-1] == outputs[-1][0].group:
                self._set_apart(index, outputs, laid)
        return laid

    def _set_apart(
        self,
        index: int,
        asked: Sequence[tuple[LayerOutput, Layout]],
        laid: Sequence[Layout],
    ) -> None:
        """Note the ops that see a result as was asked or made, where its group lies otherwise.

        A contraction makes it as is asked of its own result. Where a bias is added first it makes
        it as its operands have it, and what is asked to be whole is gathered. But sums that are
        whole only to be sliced are scattered. What is asked to be split otherwise than the group is
        moved there.

        Args:
            index: of the contraction.
            asked: the outputs that it makes, and the layouts that are asked of them.
            laid: the layouts of all groups.
        """
        read, want = {output.identity for output, _ in asked}, asked[-1][1]
        as_made = any(output.as_made for output, _ in asked)
        op, around = self._program.ops[index], self._around[index](laid)
        group = op.results[-1].group
        readers = [place for one in read for place in self._reads.get((one, group), ())]
        own = want if as_made else self._alone(index, [self._number(one) for one in around])
        splits = (
            factors_split(array, layout, op.factor_sizes, self._axis_sizes)
            for array, layout in zip(op.operands, around[: len(op.operands)], strict=True)
        )
        summed = {axis for split in splits for axis, f in enumerate(split) if f in op.reduced}
        made, moved = list(want), list(want)
        for axis, (dim, shared) in enumerate(zip(want, around[-1], strict=True)):
            if dim != WHOLE:
                moved[axis] = shared
            elif own[axis] != WHOLE:
                made[axis] = own[axis]
            elif axis in summed and not readers:
                made[axis] = moved[axis] = shared
        self._see(index, len(around) - 1, tuple(made), laid)
        if made != moved:
            self.apart.moved[index] = (tuple(made), tuple(moved))
        for reader, position in sorted(readers):
            self._see(reader, position, want, laid)

    def _see(self, index: int, position: int, layout: Layout, laid: Sequence[Layout]) -> None:
        """Note the layout in which an op sees one of its arrays, if it is not the group's."""
        seen = self.apart.around.get(index)
        if seen is None:
            seen = self._around[index](laid)
            seen = (*seen[:-1], self.apart.torn.get(index, seen[-1]))
        if seen[position] != layout:
            self.apart.around[index] = (*seen[:position], layout, *seen[position + 1 :])

    def _wanted_arrays(
        self, asked: Sequence[tuple[LayerOutput, Layout]]
    ) -> dict[int, dict[int, _Number]]:
        """Index of an op -> its arrays, by position, whose layout is asked, and how."""
        wanted: dict[int, dict[int, _Number]] = {}
        for output, layout in asked:
            number = self._number(layout)
            for index, position in self._reads.get((output.identity, output.group), ()):
                wanted.setdefault(index, {})[position] = number
            maker = output.made_by
            if maker is not None and self._groups_of[maker][-1] == output.group:
                wanted.setdefault(maker, {})[len(self._groups_of[maker]) - 1] = number
        return wanted

    def _run_level(
        self,
        level: int,
        state: list[_Number],
        fixed: Mapping[int, Layout],
        wanted: Mapping[int, Mapping[int, _Number]],
        unsettled: bytearray,
    ) -> None:
        """Give each op its turn in order, and another where something around it changes afterwards.

        That one it has at once, before the next op's first, and the op that was touched last before
        the others (so MLIR's rewriter goes about it). An op that could do no more at the level
        before has its turn in order only if something around it changed meanwhile, and one that is
        settled has none. An op whose own array a rule lays out sees it so, and does not spread to
        what is made of it.
        """
        may, begins, spreads = self._may[level], self._begins[level], self._spreads[level]
        around_of, groups_of, touching = self._around, self._groups_of, self._touching
        meets = self._meets if level == _TEARING else bytes(len(spreads))
        ready = bytearray((self._new[level] & np.frombuffer(unsettled, dtype=bool)).tobytes())
        waiting = bytearray(len(ready))
        again: list[int] = []
        at = -1
        while again or (at := ready.find(1, at + 1)) >= 0:
            in_order = not again
            index = at if in_order else again.pop()
            waiting[index] = False
            around = around_of[index](state)
            own = wanted.get(index) if wanted else None
            if own:
                around = tuple(own.get(place, number) for place, number in enumerate(around))
            if in_order and meets[index]:
                self._tear(index, around)
            changes = spreads[index].get(around, _NOT_KNOWN)
            if changes is _NOT_KNOWN:
                changes = self._spread(index, level, around)
            if changes is None:
                unsettled[index] = False
                continue
            for position, number in changes:
                group = groups_of[index][position]
                if group in fixed or (own and position in own):
                    continue
                state[group] = number
                for other in touching[group]:
                    unsettled[other] = True
                    if other > at and begins[other]:
                        ready[other] = True
                    elif may[other] and not waiting[other]:
                        waiting[other] = True
                        again.append(other)

    def _tear(self, index: int, around: tuple[_Number, ...]) -> None:
        """Note a matmul whose operands give its result another layout than its group has."""
        shared = self._layouts[around[-1]]
        if around[-1] != _ALL_WHOLE and torn_axes(own := self._alone(index, around), shared):
            self.apart.torn[index] = own

    def _alone(self, index: int, around: Sequence[_Number]) -> Layout:
        """The layout that its operands alone give the result of a matmul."""
        changes = self._spread(index, _TEARING, (*around[:-1], _ALL_WHOLE))
        return self._layouts[dict(changes or ()).get(len(around) - 1, _ALL_WHOLE)]

    def _spread(self, index: int, level: int, around: tuple[_Number, ...]) -> _Changes:
        """What one op changes at a level, remembered; None where it is settled then."""
        table = self._spreads[level][index]
        changes = table.get(around, _NOT_KNOWN)
        if changes is _NOT_KNOWN:
            op = self._program.ops[index]
            sizes = [self._program.groups[group].sizes for group in self._groups_of[index]]
            layouts = [self._layouts[number] for number in around]
            changed = spread(op, level, layouts, sizes, self._axis_sizes)
            changes = tuple((position, self._number(layout)) for position, layout in changed)
            later = (at for at in range(level + 1, LEVELS) if self._new[at][index])
            if not changes and all(self._spread(index, at, around) is None for at in later):
                changes = None
            table[around] = changes
        return changes


def torn_axes(own: Layout, shared: Layout) -> list[int]:
    """The mesh axes that split other dimensions in one layout than in the other."""
    both = enumerate(zip(own, shared, strict=True))
    return [axis for axis, (one, two) in both if one != two and WHOLE not in (one, two)]
