"""The softmaxes of matmuls' results: attention, whose shares a matmul weighs values by, and logits.

A TPU compiler keeps what attention scores in the vector memory if that has room, and adds up the
exponentials as it makes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from autoshard.graph.program import Op, Scores

__all__ = ["Softmax", "read_softmaxes", "with_maxima", "with_scores"]


class Softmax(NamedTuple):
    """Indices of the matmul that makes the scores, of their sums and of what weighs by them.

    The last is None where no matmul does.
    """

    scores: int
    sums: int
    weighing: int | None


def read_softmaxes(ops: Sequence[Op]) -> Iterator[Softmax]:
    """Those of the forward half.

    Args:
        ops: in execution order.
    """
    for scores in sorted(with_maxima(ops)):
        made = ops[scores].results[0].group
        after = range(scores + 1, len(ops))
        sums = next((at for at in after if _is_sum(ops[at]) and _reads(ops[at], made)), None)
        if ops[scores].backward or sums is None:
            continue
        later = range(sums + 1, len(ops))
        weighing = next((at for at in later if _is_matmul(ops[at]) and _reads(ops[at], made)), None)
        yield Softmax(scores, sums, weighing)


def with_scores(ops: Sequence[Op]) -> list[Op]:
    """The ops, those of attention told which of their arrays are its scores.

    Args:
        ops: of a step that neither trains nor decodes, in execution order.
    """
    told = list(ops)
    for scores, sums, weighing in read_softmaxes(ops):
        if weighing is None:
            continue
        (made,) = ops[scores].results
        read = [set(array.factors) - {None} for array in ops[scores].operands]
        shared = set.intersection(*read)
        batch = tuple(dim for dim, factor in enumerate(made.factors) if factor in shared)
        for at in (scores, sums, weighing):
            position = [array.group for array in ops[at].arrays].index(made.group)
            known = Scores(position=position, itemsize=made.itemsize, batch=batch)
            told[at] = replace(ops[at], scores=known)
    return told


def with_maxima(ops: Sequence[Op]) -> set[int]:
    """The matmuls of whose results maxima are found, as of logits and of attention's scores."""
    made_by: dict[int, int] = {}
    found = set()
    for index, op in enumerate(ops):
        if op.kind == "contraction" and op.results:
            made_by[op.results[0].group] = index
        elif op.primitive == "reduce_max" and op.operands[0].group in made_by:
            found.add(made_by[op.operands[0].group])
    return found


def _is_sum(op: Op) -> bool:
    return op.primitive == "reduce_sum"


def _is_matmul(op: Op) -> bool:
    return op.kind == "contraction" and not op.backward


def _reads(op: Op, group: int) -> bool:
    return group in {array.group for array in op.operands}
