"""Which matmul makes an array."""

from collections.abc import Sequence

from autoshard.graph.program import Op

__all__ = ["made_by"]

_CUT_OR_JOINED = ("concatenate", "slice", "split", "stack")


def made_by(ops: Sequence[Op], group: int, *, before: int) -> int | None:
    """Index of the last matmul before an op that makes arrays of a group; None where none does.

    What is reshaped, cut or joined counts as made by what made it.

    Args:
        ops: in execution order.
        group: of the arrays.
        before: index of the op that reads them.
    """
    groups = {group}
    for index in reversed(range(before)):
        op = ops[index]
        if groups.isdisjoint(array.group for array in op.results):
            continue
        if op.kind == "contraction":
            return index
        if op.kind == "reshape" or op.primitive in _CUT_OR_JOINED:
            groups.update(array.group for array in op.operands)
    return None
