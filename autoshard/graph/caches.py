"""The keys and values of all blocks, as a decoding step carries them.

A model keeps them in one array, of which it hands each block its slice and which it puts together
anew from what the blocks return; or in an array for each block. Beside them it may carry what all
blocks read, such as an encoder's output.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from autoshard.graph.jaxpr import Equation, FlatJaxpr

__all__ = ["CacheMoves", "cache_count", "cache_moves", "rebuilt_arguments"]

_CUTTING = ("dynamic_slice", "slice", "split", "unstack")
_UPDATING = ("dynamic_update_slice",)
_JOINING = ("concatenate", "stack")
_PASSING = ("elementwise", "reshape")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMoves:
    """The equations, by position, that cut caches up and put them together.

    Attributes:
        counts: how many times the whole model runs those that stand outside of any layer.
        fused: those that are done as another reads or writes the same: cuts of which others cut
            more, updates, and parts that are joined again.
    """

    counts: dict[int, int]
    fused: frozenset[int]


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


def cache_moves(
    flat: FlatJaxpr, grows: Mapping[int, Fraction], results: Mapping[int, int]
) -> CacheMoves:
    """Follow caches from where they come in to where they go out.

    Args:
        flat: the step of the folded copy.
        grows: identity of a cache -> `cache_count` of it.
        results: identity of a result -> that of the cache whose memory it takes.
    """
    readers: dict[int, list[int]] = defaultdict(list)
    for position, equation in enumerate(flat.equations):
        for identity in equation.operands:
            readers[identity].append(position)

    def only_read_by(position: int, primitives: Sequence[str]) -> bool:
        """Whether nothing else reads what an equation makes, moves in between aside."""
        read = [p for identity in flat.equations[position].results for p in readers[identity]]
        return bool(read) and all(
            flat.equations[p].primitive in primitives
            or (flat.equations[p].link.kind in _PASSING and only_read_by(p, primitives))
            for p in read
        )

    counts: dict[int, int] = {}
    fused: set[int] = set()
    growth = dict(grows)
    for position, equation in enumerate(flat.equations):
        whole = growth.get(equation.operands[0]) if equation.operands else None
        cuts, updates = equation.primitive in _CUTTING, equation.primitive in _UPDATING
        if whole is None or not (cuts or updates or equation.link.kind in _PASSING):
            continue
        growth.update(dict.fromkeys(equation.results, whole))
        if not equation.layer:
            counts[position] = round(whole)
        if updates or (cuts and only_read_by(position, _CUTTING)):
            fused.add(position)
    growth = {result: grows[cache] for result, cache in results.items()}
    for position, equation in reversed(list(enumerate(flat.equations))):
        whole = next((growth[i] for i in equation.results if i in growth), None)
        joins = equation.primitive in _JOINING
        if whole is None or not (joins or equation.link.kind in _PASSING):
            continue
        growth.update(dict.fromkeys(equation.operands, whole))
        if not equation.layer:
            counts[position] = round(whole)
        if joins and only_read_by(position, _JOINING):
            fused.add(position)
    return CacheMoves(counts=counts, fused=frozenset(fused))


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
