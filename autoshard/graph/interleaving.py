"""Stacks that interleave the halves of heads, as the rotary embeddings of some models do."""

from collections.abc import Sequence
from dataclasses import replace

from autoshard.graph.program import Array, Op

__all__ = ["with_interleaving"]


def with_interleaving(ops: Sequence[Op]) -> list[Op]:
    """The ops, those that interleave told how many heads of a query share a key's.

    Args:
        ops: in execution order.
    """
    return [
        replace(op, interleaves=_sharing(op, ops[index + 1 :])) if _interleaves(op) else op
        for index, op in enumerate(ops)
    ]


def _interleaves(op: Op) -> bool:
    """Whether it stacks arrays along a new last dimension."""
    return op.primitive == "stack" and op.results[0].factors[-1] is None


def _sharing(stack: Op, later: Sequence[Op]) -> int:
    """How many heads share a key's where a query is stacked; 1 where none does or it is no query.

    The matmul that makes the scores has heads along its batch, and those that share a key's along
    its rows.

    Args:
        stack: what interleaves.
        later: what comes after it.
    """
    groups = {stack.results[0].group}
    for op in later:
        read = [array for array in op.operands if array.group in groups]
        if read and op.kind == "contraction":
            return _heads_in_rows(op, read[0])
        if read and op.kind == "reshape":
            groups.update(array.group for array in op.results)
    return 1


def _heads_in_rows(op: Op, query: Array) -> int:
    """How many heads a matmul has along its rows, beside the tokens."""
    others = {factor for array in op.operands if array != query for factor in array.factors}
    rows = [op.factor_sizes[f] for f in query.factors if f is not None and f not in others]
    return rows[1] if len(rows) > 1 else 1
