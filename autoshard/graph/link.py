"""The factors of one op, and what its rule is made of."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ADDING",
    "ONCE",
    "PASSING",
    "Label",
    "Labels",
    "Link",
    "LinkRule",
    "Reads",
    "Shape",
    "drop_ones",
    "numbered",
]

Shape = tuple[int, ...]
Label = Hashable
Labels = tuple[Label | None, ...]

PASSING = ("elementwise", "reshape")
"""Kinds of link whose result holds its operand element for element."""
ADDING = ("add", "add_any", "sub")
"""Primitives that add arrays of one shape up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """How an op reads an operand.

    Attributes:
        times: how often: in each turn of a loop.
        is_sliced: whether each time another slice, one of as many.
    """

    times: int = 1
    is_sliced: bool = False


ONCE = Reads()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The factors of one op.

    Attributes:
        kind: `elementwise`, `reshape`, `broadcast`, `contraction`, `reduction`, `gather`,
            `scatter`, `slice`, `source`, `loop` or `unknown`; propagation and cost go by it.
        operands: for each operand, the factor of each dimension, or None where it must be whole.
        results: the same for each result.
        reduced: the factors whose splitting leaves partial sums in the results.
        shifted: the factors along which an element changes its place: split, they make neighbours
            exchange the edges of their shards.
        gathered: the factors that layouts spread along, although the op needs them whole.
        sizes: factor -> its size, where that is not the size of the dimension (a reshape's
            parts).
        inner: factor -> the one inside it, where some dimension of a reshape holds both.
        reads: of a loop, how it reads each operand; none of what reads each once.
    """

    kind: str
    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]
    reduced: frozenset[Label] = frozenset()
    shifted: frozenset[Label] = frozenset()
    gathered: frozenset[Label] = frozenset()
    sizes: Mapping[Label, int] = field(default_factory=dict)
    inner: Mapping[Label, Label] = field(default_factory=dict)
    reads: tuple[Reads, ...] = ()


LinkRule = Callable[[Sequence[Shape], Sequence[Shape], Mapping[str, Any]], Link]


def numbered(shape: Shape, whole: Sequence[int] = ()) -> Labels:
    """Label dimension i with i, leaving out those of size 1 and those that must stay whole."""
    return tuple(None if size == 1 or dim in whole else dim for dim, size in enumerate(shape))


def drop_ones(labels: Sequence[Label | None], shape: Shape) -> Labels:
    """The labels, without those of dimensions of size 1."""
    return tuple(None if size == 1 else label for label, size in zip(labels, shape, strict=True))
