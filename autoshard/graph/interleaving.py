"""Stacks that interleave the halves of heads, as the rotary embeddings of some models do."""

from collections.abc import Sequence
from dataclasses import replace

from autoshard.graph.program import Array, Interleaving, Op

__all__ = ["with_interleaving"]

_HALVES = 2


def with_interleaving(ops: Sequence[Op]) -> list[Op]:
    """The ops, those told that interleave halves for a matmul.

    Args:
        ops: in execution order.
    """
    return [
        replace(op, interleaving=_interleaving(op, ops[index + 1 :])) if _may(op) else op
        for index, op in enumerate(ops)
    ]


def _may(op: Op) -> bool:
    """Whether it stacks two arrays along a new last dimension."""
    is_pair = op.primitive == "stack" and len(op.operands) == _HALVES
    return is_pair and op.results[0].factors[-1] is None


def _interleaving(stack: Op, later: Sequence[Op]) -> Interleaving | None:
    """What it interleaves; None where no matmul reads that, as it is or reshaped.

    Args:
        stack: what may interleave.
        later: what comes after it.
    """
    groups = {stack.results[0].group}
    for op in later:
        read = [array for array in op.operands if array.group in groups]
        if read and op.kind == "contraction":
            return _of_heads(op, read[0], len(stack.results[0].factors))
        if read and op.kind == "reshape":
            groups.update(array.group for array in op.results)
    return None


def _of_heads(op: Op, heads: Array, n_dims: int) -> Interleaving | None:
    """What a matmul has of some heads along its rows: tokens, and the heads that share a key's.

    Args:
        op: the matmul.
        heads: which of its operands they are.
        n_dims: of the heads, with halves and pairs in place of their width.
    """
    others = {factor for array in op.operands if array is not heads for factor in array.factors}
    rows = {
        dim: op.factor_sizes[factor]
        for dim, factor in enumerate(heads.factors)
        if factor is not None and factor not in others
    }
    if not rows:
        return None
    tokens = max(rows, key=rows.__getitem__)
    sharing = {dim: size for dim, size in rows.items() if dim != tokens}
    # Where they were made dimensions of their own the tokens may have moved.
    n_before = sum(dim < tokens for dim in sharing) if len(heads.factors) == n_dims else 0
    return Interleaving(tokens=tokens - n_before, sharing=max(sharing.values(), default=1))
