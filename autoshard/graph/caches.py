"""The keys and values of all blocks, as a decoding step carries them.

A model keeps them in one array, of which it hands each block its slice and which it puts together
anew from what the blocks return; or in an array for each block. Beside them it may carry what all
blocks read, such as an encoder's output.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from autoshard.graph.jaxpr import Equation, FlatJaxpr

__all__ = ["cache_count", "rebuilt_arguments"]

_JOINING = ("concatenate", "stack")
_PASSING = ("elementwise", "reshape")


def cache_count(flat: FlatJaxpr, cache: int, count_of: Callable[[str], int]) -> Fraction:
    """By how much a carried array of the folded copy grows in the whole model.

    Args:
        flat: the step of the copy.
        cache: identity of the array.
        count_of: how many times the whole model has a layer of the copy.

    Returns:
        The mean, over the arrays cut from it outside of any layer, of how many layers like their
        reader there are; 1 for what layers of several counts read whole.
    """
    derived, counts = {cache}, dict[int, int]()
    for equation in flat.equations:
        read = derived.intersection(equation.operands)
        if not equation.layer and read:
            derived.update(equation.results)
            continue
        for identity in read:
            count = count_of(equation.layer)
            counts[identity] = min(count, counts.get(identity, count))
    return Fraction(sum(counts.values()), len(counts)) if counts else Fraction(1)


def rebuilt_arguments(flat: FlatJaxpr, replaces: Sequence[int | None]) -> frozenset[int]:
    """The arguments, by index, whose place a result takes that is joined from parts.

    The parts are all there before it is, so that its bytes are there twice.

    Args:
        flat: the step.
        replaces: for each result, the index of the argument whose memory it takes, or None.
    """
    made_by = flat.made_by()
    return frozenset(
        argument
        for identity, argument in zip(flat.outputs, replaces, strict=True)
        if argument is not None and identity is not None and _is_joined(identity, made_by)
    )


def _is_joined(identity: int, made_by: Mapping[int, Equation]) -> bool:
    equation = made_by.get(identity)
    while equation and equation.link.kind in _PASSING and len(equation.operands) == 1:
        equation = made_by.get(equation.operands[0])
    return equation is not None and equation.primitive in _JOINING
