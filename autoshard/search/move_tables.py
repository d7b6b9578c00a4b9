"""What moving an array costs, for each choice of an op and each layout that the array may have.

What a dimension is called makes no difference: two pairs of choice and layout cost the same if on
each axis the same happens to the array (`_kinds`). So one pair of each kind is priced, by
`transfers_between`; on three axes that is one in dozens. Lookups, whose collectives depend on which
dimension is which, are priced pair by pair, and so is all where parts of an axis are on their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoshard.cost.collective_matmul import may_decompose, windowed_dims
from autoshard.cost.shards import Choice, moved_bytes
from autoshard.cost.step import StepPricer
from autoshard.cost.transfers import Transfer, folded_sums, lies_in_op, transfers_between
from autoshard.graph.program import WHOLE, Array, Layout, Op

__all__ = ["MoveSeconds", "MoveTables"]

MoveSeconds = npt.NDArray[np.float64]
"""[2, choices, layouts], in seconds."""

_LOOKUPS = ("gather", "scatter")

_Kinds = npt.NDArray[np.int64]

# What may happen to an array on an axis. How much is moved where it is gathered depends on what is
# still split: the last kind counts on by how many axes are gathered before, and once more as far
# where compute may hide it.
_STAYS_WHOLE, _STAYS_SPLIT, _SLICED, _EXCHANGED, _SUMMED, _SCATTERED, _GATHERED = range(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """An array of an op, on its way between the op and where it lies.

    Attributes:
        op: the op.
        array: one of its operands or results.
        operand: position among the operands, or None for a result.
        hidden_dims: the dimensions whose gathers compute may hide.
    """

    op: Op
    array: Array
    operand: int | None
    hidden_dims: frozenset[int]


class MoveTables:
    """Tables for the ops of a program, priced once for all that are alike.

    Args:
        pricer: prices of the program on the machine.
    """

    def __init__(self, pricer: StepPricer) -> None:
        self._pricer = pricer
        self._machine = pricer.machine
        self._known: dict[tuple[object, ...], dict[object, tuple[float, float]]] = {}

    def table(
        self,
        op: Op,
        array: Array,
        operand: int | None,
        choices: Sequence[Choice],
        layouts: Sequence[Layout],
    ) -> MoveSeconds:
        """The two sums of `autoshard.search.lower_bound`.

        What compute might hide is taken to be hidden.

        Args:
            op: the op.
            array: one of its operands or results.
            operand: position among the operands, or None for a result.
            choices: the factor that the op splits over each axis, or `WHOLE`; at least one.
            layouts: those of the array, at least one.
        """
        way = self._way(op, array, operand)
        known = self._known.setdefault(self._like(way), {})
        lying = [lies_in_op(op, array, operand, choice) for choice in choices]
        if op.kind in _LOOKUPS or self._machine.parts.is_cut:
            rows = [
                list(self._pair_by_pair(way, made, partial, layouts, known))
                for made, partial in lying
            ]
            return np.array(rows).transpose(2, 0, 1)
        kinds = _kinds(lying, layouts, way)
        found, first, which = np.unique(kinds, return_index=True, return_inverse=True)
        for kind, at in zip(found.tolist(), first.tolist(), strict=True):
            if kind not in known:
                row, column = divmod(at, len(layouts))
                made, partial = lying[row]
                known[kind] = self._sums(way, made, partial, layouts[column])
        priced = np.array([known[kind] for kind in found.tolist()])
        return priced.T[:, which.reshape(kinds.shape)]

    def _way(self, op: Op, array: Array, operand: int | None) -> _Way:
        hidden = windowed_dims(op, array, operand, self._machine)
        if operand is not None and self._pricer.ops.beside.may_hide(op, array):
            hidden = set(range(len(array.factors)))
        return _Way(op=op, array=array, operand=operand, hidden_dims=frozenset(hidden))

    def _like(self, way: _Way) -> tuple[object, ...]:
        """All that the moves depend on beside what happens on each axis."""
        op, array, is_result = way.op, way.array, way.operand is None
        return (
            (op.kind, array.factors, op.operands[-1].factors) if op.kind in _LOOKUPS else None,
            op.backward,
            op.is_batch,
            array.n_bytes if is_result else moved_bytes(op, array, self._machine),
            array.is_held,
            array.reads,
            is_result,
        )

    def _pair_by_pair(
        self,
        way: _Way,
        made: Layout,
        partial: Choice,
        layouts: Sequence[Layout],
        known: dict[object, tuple[float, float]],
    ) -> Iterator[tuple[float, float]]:
        for layout in layouts:
            pair = (made, partial, layout, way.hidden_dims)
            if pair not in known:
                known[pair] = self._sums(way, made, partial, layout)
            yield known[pair]

    def _sums(
        self, way: _Way, made: Layout, partial: Choice, layout: Layout
    ) -> tuple[float, float]:
        """What moving an array adds to the two sums, if compute may hide gathers of some dims.

        Args:
            way: the array.
            made: how it lies in the op.
            partial: the factors that are summed over each axis, or `WHOLE`.
            layout: how it lies outside.
        """
        machine = self._machine
        moves: Sequence[Transfer] = transfers_between(
            way.op, way.array, way.operand, made, partial, layout, machine
        )
        if way.operand is None:
            moves = folded_sums(moves, machine)
        blocking = written = everything = 0.0
        for move in moves:
            everything += move.seconds * move.n_runs
            written += move.memory_seconds * move.n_runs
            dim = layout[machine.axis_of(move.axis)]
            hidden = move.overlapped or (dim in way.hidden_dims and move.kind == "all-gather")
            if not (hidden or may_decompose(move, machine)):
                blocking += move.seconds * move.n_runs
        return blocking + written, everything


def _kinds(lying: Sequence[tuple[Layout, Choice]], layouts: Sequence[Layout], way: _Way) -> _Kinds:
    """What happens to an array on all axes, as a number, [choices, layouts].

    Args:
        lying: for each choice how the array lies in the op, and what is summed over each axis.
        layouts: how it may lie outside.
        way: the array.
    """
    made, partial, outside = (
        np.array(each, dtype=np.int64).reshape(len(each), -1)
        for each in (*zip(*lying, strict=True), layouts)
    )
    inside, outside = made[:, None], outside[None]
    have, want = (inside, outside) if way.operand is None else (outside, inside)
    is_summed = (partial != WHOLE)[:, None]
    kinds = np.select(
        [
            is_summed & (want == WHOLE),
            is_summed,
            (have == want) & (have == WHOLE),
            have == want,
            have == WHOLE,
            want != WHOLE,
        ],
        [_SUMMED, _SCATTERED, _STAYS_WHOLE, _STAYS_SPLIT, _SLICED, _EXCHANGED],
        _GATHERED,
    )
    gathered = kinds == _GATHERED
    n_before = np.zeros_like(kinds)
    n_axes = kinds.shape[-1]
    for axis in range(n_axes):
        for other in range(n_axes):
            # The last dimension first, as `transfers_between` has it.
            before = have[..., other] > have[..., axis]
            before |= (have[..., other] == have[..., axis]) & (other < axis)
            n_before[..., axis] += gathered[..., other] & before
    hidden = np.isin(outside, list(way.hidden_dims)) & gathered
    digits = kinds + gathered * n_before + (_GATHERED + n_axes) * hidden
    weights = (2 * (_GATHERED + n_axes)) ** np.arange(n_axes)
    kinds_of_all: _Kinds = (digits * weights).sum(axis=-1)
    return kinds_of_all
