"""When the arrays of a step are in memory, whatever its layout: from one op to another.

Times are indices of ops. An array is there while the op at its start runs, while that at its end
does, and in between.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoshard.graph.program import Op, Program

__all__ = [
    "Bytes",
    "Lifetimes",
    "alive",
    "gradient_groups",
    "kept_weights",
    "lifetimes",
    "read_at_turn",
]

Bytes = npt.NDArray[np.float64]
Times = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """When arrays live: the result of each op, what fused ops write for it, and what it gathers.

    Attributes:
        own: when each op runs.
        last_read: until when its result is needed.
        start, end: of the results of all ops, then of what is written for them, then of what they
            gather: from when until when it is there.
        copies: how many like each of these there are at once in the whole model.
        may_be_on_chip: all but what the forward half leaves to the backward one.
        last_forward: the matmul that ends the forward half, see `_last_forward_matmul`.
        gathered_again: pairs of a matmul of the forward half and one of the backward half, for
            which the first keeps the weight that it gathers.
        sums_end: until when partial sums of gradients may wait: the last matmul that makes some.
        gradients: the group of each gradient -> that of the weight or slot which it changes.
    """

    own: Times
    last_read: Times
    start: Times
    end: Times
    copies: Bytes
    may_be_on_chip: npt.NDArray[np.bool_]
    last_forward: int | None
    gathered_again: tuple[tuple[int, int], ...]
    sums_end: int
    gradients: dict[int, int]


def lifetimes(program: Program) -> Lifetimes:
    """Read them off a program.

    - What the forward half leaves to the backward half is there once for each block that an op
      stands for.
    - A weight is gathered while the matmul before runs, and anew for the backward half. That of
      the last matmul is kept, since its gradient comes next.
    - That gradient, the first to be made, waits for the others.
    - New values of weights and slots that are gathered are there to the end, those of all blocks.
    """
    ops = program.ops
    updates = _updates(program)
    gradients = {gradient: changed for changed, gradient in gradient_groups(program).items()}
    last_read = np.array(program.last_readers, dtype=np.intp)
    makes_gradient = [
        index
        for index, op in enumerate(ops)
        if op.kind == "contraction"
        and op.backward
        and any(array.group in gradients for array in op.results)
    ]
    last_read[makes_gradient[:1]] = len(ops) - 1
    chains_read = np.arange(len(ops))
    for index, chained in program.chained_operands.items():
        chains_read[index] = max(chain.readers[-1] for chain in chained.values())
    gathered_from = _gathered_from(ops)
    gathered_to = np.arange(len(ops))
    last_forward = _last_forward_matmul(ops)
    again = _gathered_again(ops, last_forward)
    for first, later in again:
        gathered_to[first] = max(gathered_to[first], later)
    gathered_to[updates] = len(ops) - 1
    n_gathered = np.ones(len(ops))
    n_gathered[updates] = [float(ops[index].count) for index in updates]
    own, crosses = np.arange(len(ops)), _crosses(ops, program.last_readers)
    return Lifetimes(
        own=own,
        last_read=last_read,
        start=np.concatenate([own, own, gathered_from]),
        end=np.concatenate([last_read, chains_read, gathered_to]),
        copies=np.concatenate(
            [_copies(ops, crosses), _copies(ops, _crosses(ops, chains_read)), n_gathered]
        ),
        may_be_on_chip=np.concatenate([~crosses, np.ones(2 * len(ops), dtype=bool)]),
        last_forward=last_forward,
        gathered_again=again,
        sums_end=max(makes_gradient, default=0),
        gradients=gradients,
    )


def _copies(ops: Sequence[Op], crosses: npt.NDArray[np.bool_]) -> Bytes:
    """How many there are at once of what comes with each op: one a block where it crosses."""
    return np.where(crosses, [float(op.count) for op in ops], 1.0)


def _crosses(ops: Sequence[Op], last_read: Iterable[int]) -> npt.NDArray[np.bool_]:
    """Whether what comes with each op of the forward half is needed up to one of the backward."""
    pairs = zip(ops, last_read, strict=True)
    return np.array([ops[last].backward and not op.backward for op, last in pairs], dtype=bool)


def gradient_groups(program: Program) -> dict[int, int]:
    """Group of each weight or slot that the step changes -> that of the gradient that changes it.

    That lies as it is made, and is brought into the layout of the weight or slot.
    """
    updates = (program.ops[index] for index in _updates(program))
    return {op.results[0].group: op.operands[0].group for op in updates}


def _updates(program: Program) -> list[int]:
    """The ops of their own that make the new value of a weight or a slot."""
    arguments = {argument.group for argument in program.arguments}
    return [
        index
        for index, op in enumerate(program.ops)
        if op.kind == "elementwise" and any(array.group in arguments for array in op.results)
    ]


def _gathered_from(ops: Sequence[Op]) -> Times:
    """From when a weight is there that an op gathers."""
    start = np.arange(len(ops))
    matmuls = [i for i, op in enumerate(ops) if op.kind == "contraction" and _weights_read(op)]
    start[matmuls[1:]] = matmuls[:-1]
    return start


def _gathered_again(ops: Sequence[Op], last: int | None) -> tuple[tuple[int, int], ...]:
    """The last matmul of the forward half, with each of the backward half that reads its weight."""
    if last is None:
        return ()
    kept = _weights_read(ops[last])
    backward = (i for i, op in enumerate(ops) if op.kind == "contraction" and op.backward)
    return tuple((last, i) for i in backward if kept & _weights_read(ops[i]))


def kept_weights(ops: Sequence[Op]) -> set[int]:
    """What stays gathered from the end of the forward half to the gradient that comes next."""
    last = _last_forward_matmul(ops)
    return set() if last is None else _weights_read(ops[last])


def read_at_turn(ops: Sequence[Op]) -> set[int]:
    """What the first matmul of the backward half reads, if its layer computes no gradient beside.

    Nothing runs beside what moves that: all that follows waits for the matmul.
    """
    backward = [op for op in ops if op.kind == "contraction" and op.backward]
    if not backward or any(op.layer == backward[0].layer for op in backward[1:]):
        return set()
    return {array.identity for array in backward[0].operands if not array.is_held}


def _last_forward_matmul(ops: Sequence[Op]) -> int | None:
    """The matmul with a weight that ends the forward half of a step; None without a backward one.

    Its weight, once gathered, is kept: its gradient comes next.
    """
    if not any(op.backward for op in ops):
        return None
    forward = [i for i, op in enumerate(ops) if op.kind == "contraction" and not op.backward]
    return max((i for i in forward if _weights_read(ops[i])), default=None)


def _weights_read(op: Op) -> set[int]:
    """The arrays that it reads and that were there before the step."""
    return {array.identity for array in op.operands if array.is_held}


def alive(n_ops: int, n_bytes: Bytes, start: Times, end: Times) -> Bytes:
    """Bytes in memory while each of so many ops runs, of arrays there from `start` to `end`."""
    begun = np.bincount(start, weights=n_bytes, minlength=n_ops).cumsum()
    ended = np.bincount(end, weights=n_bytes, minlength=n_ops)
    still: Bytes = begun - ended.cumsum() + ended
    return still
