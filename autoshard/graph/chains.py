"""Which blocks of a step read what others made."""

from collections.abc import Callable
from functools import cache

from autoshard.graph.equations import FlatJaxpr

__all__ = ["Block", "blocks_read"]

Block = tuple[str, int]


def blocks_read(
    flat: FlatJaxpr, block_of: Callable[[str], Block | None]
) -> dict[Block, frozenset[Block]]:
    """For each block that runs: those whose results reach it, however far, before the gradient.

    Args:
        flat: the step.
        block_of: the block that a layer is in, by its path: its stack's template and its number.
    """
    block_of = cache(block_of)
    bits: dict[Block, int] = {}
    reached: dict[int, int] = {}
    reads: dict[Block, int] = {}
    for equation in flat.equations:
        if equation.backward:
            continue
        before = 0
        for identity in equation.operands:
            before |= reached.get(identity, 0)
        block = block_of(equation.layer)
        if block is not None:
            reads[block] = reads.get(block, 0) | before
            before |= bits.setdefault(block, 1 << len(bits))
        reached.update(dict.fromkeys(equation.results, before))
    return {
        block: frozenset(other for other, bit in bits.items() if mask & bit)
        for block, mask in reads.items()
    }
