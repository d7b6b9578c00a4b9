"""The keys and values of all blocks, as a decoding step carries them.

A model keeps them in one array, of which it hands each block its slice and which it puts together
anew from what the blocks return; or in an array for each block. Beside them it may carry what all
blocks read, such as an encoder's output.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.link import PASSING

__all__ = ["CacheMoves", "cache_count", "cache_moves", "rebuilt_arguments"]

_CUTTING = ("dynamic_slice", "slice", "split", "unstack")
_UPDATING = ("dynamic_update_slice",)
_ASSEMBLING = ("concatenate", "stack")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMoves:
    """The equations, by position, that cut caches up and put them together.

    Attributes:
        counts: how many times the whole model runs those that stand outside of any layer.
        all: every one of them.
        fused: those that are done as another reads or writes the same: cuts of which others cut
            more, updates, and parts that are joined again.
    """

    counts: dict[int, int]
    all: frozenset[int]
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
    flat: FlatJaxpr, growth: Mapping[int, int | Fraction], replaces: Sequence[int | None]
) -> CacheMoves:
    """Follow caches from where they come in, and back from where they go out.

    Args:
        flat: the step of the folded copy.
        growth: index of a cache among the arguments -> `cache_count` of it.
        replaces: as for `rebuilt_arguments`.
    """
    come_in = {flat.inputs[argument]: grows for argument, grows in growth.items()}
    go_out = {
        identity: growth[argument]
        for identity, argument in zip(flat.outputs, replaces, strict=True)
        if identity is not None and argument is not None and argument in growth
    }
    ahead = [(e, e.operands[:1], e.results) for e in flat.equations]
    back = [(e, e.results, e.operands) for e in flat.equations]
    followed = _followed(enumerate(ahead), come_in, (*_CUTTING, *_UPDATING))
    followed |= _followed(reversed(list(enumerate(back))), go_out, _ASSEMBLING)
    readers = _readers(flat) if followed else {}
    return CacheMoves(
        counts={p: round(grows) for p, grows in followed.items() if not flat.equations[p].layer},
        all=frozenset(followed),
        fused=frozenset(p for p in followed if _is_fused(p, flat, readers)),
    )


def _followed(
    steps: Iterable[tuple[int, tuple[Equation, Sequence[int], Sequence[int]]]],
    known: dict[int, int | Fraction],
    primitives: Sequence[str],
) -> dict[int, int | Fraction]:
    """The equations that move parts of caches, by position, and how much each of these grows.

    Args:
        steps: position of an equation, the equation, and the arrays before and behind it.
        known: identity of a cache, or a part of one -> how much it grows; what is met joins it.
        primitives: what moves parts, beside equations that pass them on.
    """
    followed = {}
    for position, (equation, before, behind) in steps:
        grows = next((known[identity] for identity in before if identity in known), None)
        moves = equation.primitive in primitives or equation.link.kind in PASSING
        if grows is not None and moves:
            followed[position] = grows
            known.update(dict.fromkeys(behind, grows))
    return followed


def _is_fused(position: int, flat: FlatJaxpr, readers: Mapping[int, Sequence[int]]) -> bool:
    """Whether another equation reads or writes the same part meanwhile."""
    primitive = flat.equations[position].primitive
    return primitive in _UPDATING or any(
        primitive in alike and _only_read_by(alike, position, flat, readers)
        for alike in (_CUTTING, _ASSEMBLING)
    )


def _only_read_by(
    primitives: Sequence[str], position: int, flat: FlatJaxpr, readers: Mapping[int, Sequence[int]]
) -> bool:
    """Whether nothing else reads what an equation makes, moves in between aside."""
    read = [p for identity in flat.equations[position].results for p in readers.get(identity, ())]
    return bool(read) and all(
        flat.equations[p].primitive in primitives
        or (flat.equations[p].link.kind in PASSING and _only_read_by(primitives, p, flat, readers))
        for p in read
    )


def _readers(flat: FlatJaxpr) -> dict[int, list[int]]:
    """Identity of an array -> positions of the equations that read it."""
    readers: dict[int, list[int]] = {}
    for position, equation in enumerate(flat.equations):
        for identity in equation.operands:
            readers.setdefault(identity, []).append(position)
    return readers


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
    while equation and equation.link.kind in PASSING and len(equation.operands) == 1:
        equation = made_by.get(equation.operands[0])
    return equation is not None and equation.primitive in _ASSEMBLING
