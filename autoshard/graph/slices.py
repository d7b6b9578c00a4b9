"""Slices of what matmuls make: a compiler for TPUs slices what they read, and multiplies less.

So where a model reads pictures beside text and returns the logits of the text alone. It does so
after it has partitioned the step, and cannot where that put anything between matmul and slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.model.outputs import MARK

__all__ = ["Slice", "read_slices"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A slice that is all that is read of a matmul's result.

    Attributes:
        identity: of the slice.
        dims: the dimensions that are cut.
        share: elements of the slice over those of the result.
    """

    identity: int
    dims: tuple[int, ...]
    share: Fraction


def read_slices(flat: FlatJaxpr) -> dict[int, Slice]:
    """Identity of a matmul's result -> the slice that is all that is read of it.

    Args:
        flat: the step.
    """
    readers = flat.n_readers()
    made_by = flat.made_by()
    found = {}
    for equation in flat.equations:
        if equation.primitive != "slice":
            continue
        (identity,) = equation.results
        source = _behind_marks(equation.operands[0], made_by, readers)
        if source is None or made_by[source].primitive != "dot_general":
            continue
        before, after = flat.arrays[source], flat.arrays[identity]
        sizes = enumerate(zip(before.shape, after.shape, strict=True))
        found[source] = Slice(
            identity=identity,
            dims=tuple(dim for dim, (whole, cut) in sizes if whole != cut),
            share=Fraction(after.n_elements, before.n_elements),
        )
    return found


def _behind_marks(
    identity: int, made_by: Mapping[int, Equation], readers: Mapping[int, int]
) -> int | None:
    """The array that an array marks, made by the step, or None where anything else reads it."""
    while identity in made_by and readers[identity] == 1:
        equation = made_by[identity]
        if equation.primitive != MARK:
            return identity
        (identity,) = equation.operands
    return None
