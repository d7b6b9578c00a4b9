"""Which blocks of a folded model stand for how many blocks of the real one.

A stack of blocks that repeats with a period is traced and compiled with a few periods only. Its
blocks are `lead` blocks of their own, `n_periods` periods, and `remainder` blocks that begin one
more period:

    n_blocks = lead + n_periods * period + remainder
    traced   = lead + k * period + remainder

The traced copy holds the first periods and the last one. The last of the first stands for those
left out: of two periods the first for `n_periods - 1`, of three the middle for `n_periods - 2`.
"""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from autoshard.model.paths import block_pattern

__all__ = ["BlockStack", "Folding", "find_repetition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStack:
    """One stack of repeated blocks.

    Attributes:
        template: their path, for example `decoder_block_*`.
        start: the number of the first block.
        n_blocks: blocks of the real model.
        lead: blocks before the first period.
        period: blocks after which the kinds of block repeat.
        traced: blocks of the folded model; equal to `n_blocks` where it is not folded.
    """

    template: str
    start: int = 0
    n_blocks: int
    lead: int = 0
    period: int = 1
    traced: int

    @property
    def n_periods(self) -> int:
        """Whole periods of the real model."""
        return (self.n_blocks - self.lead) // self.period

    @property
    def traced_periods(self) -> int:
        """Whole periods of the folded model."""
        return (self.traced - self.lead) // self.period

    def folded(self, periods: int) -> "BlockStack":
        """This stack with so many periods traced, or all where it has no more."""
        remainder = (self.n_blocks - self.lead) % self.period
        kept = self.lead + periods * self.period + remainder
        return replace(self, traced=min(self.n_blocks, kept))

    def real_block(self, block: int) -> int:
        """The real block, counted from 0, that a folded one, counted from 0, is the copy of."""
        first = self.lead + (self.traced_periods - 1) * self.period
        return block if block < first else block + self.n_blocks - self.traced

    def multiplicity(self, block: int) -> int:
        """How many real blocks a folded block, counted from 0, stands for."""
        extra = self.n_periods - self.traced_periods
        return 1 + extra if 0 <= block - self._middle < self.period else 1

    def stand_ins(self) -> dict[int, tuple[int, ...]]:
        """The real blocks that folded ones are copies of -> those that each stands for."""
        kept = {self.real_block(block): [self.real_block(block)] for block in range(self.traced)}
        for block in range(self.n_blocks):
            if block not in kept:
                kept[self._middle + (block - self._middle) % self.period].append(block)
        return {block: tuple(stood_for) for block, stood_for in kept.items()}

    @property
    def _middle(self) -> int:
        """The first block of the period that stands for those left out.

        It is the last of the first periods; with a single period, that one.
        """
        return self.lead + max(0, self.traced_periods - 2) * self.period


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """The stacks of a model, folded or not.

    Attributes:
        blocks: the stacks.
        shared: for how many weights of the real model each stands that has a path which several
            blocks share: their mean.
        counts: template of a stack of which blocks are left out of the step (see
            `autoshard.model.thinning`) -> for how many each stands: 0 for those.

    >>> stack = BlockStack(template="decoder_block_*", n_blocks=28, traced=3)
    >>> [Folding(blocks=(stack,)).multiplicity(f"decoder_block_{i}/attention") for i in range(3)]
    [1, 26, 1]
    """

    blocks: tuple[BlockStack, ...] = ()
    shared: Mapping[str, Fraction] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __contains__(self, path: str) -> bool:
        """Whether it says of a path, or the beginning of one, for how many it stands."""
        return path in self.shared or self.block_of(path) is not None

    def block_of(self, path: str) -> tuple[str, int] | None:
        """The block that a path lies in: the template of its stack, and its number there from 0."""
        places = ((stack.template, self._number(path, stack)) for stack in self.blocks)
        return next(((template, block) for template, block in places if block is not None), None)

    def multiplicity(self, path: str) -> int | Fraction:
        """How many layers of the real model a layer, variable or output of this model stands for.

        Args:
            path: a path of the folded model, or the beginning of one down to the block.
        """
        if path in self.shared:
            return self.shared[path]
        counts = (
            self.counts[stack.template][block]
            if stack.template in self.counts
            else stack.multiplicity(block)
            for stack in self.blocks
            if (block := self._number(path, stack)) is not None
        )
        return math.prod(counts)

    def _number(self, path: str, stack: BlockStack) -> int | None:
        """The number from 0 of the block in this stack that a path lies in; None for no such."""
        match = re.match(rf"{block_pattern(stack.template)}(?=/|$)", path)
        number = int(match[1] or 0) - stack.start if match else -1
        n_blocks = len(self.counts.get(stack.template, range(stack.traced)))
        return number if 0 <= number < n_blocks else None


def find_repetition(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """The lead and the period of a sequence of kinds that leave least when three periods are kept.

    Args:
        kinds: the kind of each block.

    Returns:
        lead and period; (0, the whole length) where nothing repeats often enough to save a block.

    >>> find_repetition("aaaaaaa"), find_repetition("llglglglgl"[1:]), find_repetition("abcd")
    ((0, 1), (0, 2), (0, 4))
    """
    n = len(kinds)
    best = (n, 0, n)
    for lead in range(n // 2):
        for period in range(1, (n - lead) // 3 + 1):
            if all(kinds[i] == kinds[i + period] for i in range(lead, n - period)):
                traced = lead + 3 * period + (n - lead) % period
                best = min(best, (traced, lead, period))
                break
    return best[1:]
