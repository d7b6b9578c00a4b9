"""How often elementwise ops bring a matmul's result together with what others laid out.

Arrays that elementwise ops join are laid out as one group. But where the partitioner comes to a
matmul, in the order of the program, it lays the result out by the operands alone; where that is not
how the group is laid out, each elementwise op at which the two meet moves one of them, and what it
makes lies as its first operand does. In the gradient of a gated feed-forward layer that is four or
five times for one matmul.
"""

from collections import Counter
from collections.abc import Sequence

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.link import ADDING, PASSING

__all__ = ["count_meetings"]

# What these make lies as whoever reads it wants.
_FREE = ("broadcast", "source")


def count_meetings(flat: FlatJaxpr, group_of: Sequence[int]) -> dict[int, int]:
    """Identity of a contraction's result -> how often it meets others of its group.

    Args:
        flat: the step.
        group_of: the group of each array.
    """
    meetings: Counter[int] = Counter()
    # Array -> the contraction that lays it out, None for another op.
    laid_by: dict[int, int | None] = dict.fromkeys(flat.inputs)
    for equation in flat.equations:
        kind = equation.link.kind
        if kind in _FREE or not equation.results:
            continue
        if kind not in PASSING:
            made = equation.results[0] if kind == "contraction" else None
            laid_by.update(dict.fromkeys(equation.results, made))
            continue
        sources = [laid_by[i] for i in _members(equation, flat, group_of) if i in laid_by]
        if sources:
            met = len(set(sources)) > 1
            # A sum of both, as a residual stream, lies as the group does.
            sum_of_both = met and equation.primitive in ADDING
            laid_by[equation.results[0]] = None if sum_of_both else sources[0]
            if met:
                meetings.update(source for source in set(sources) if source is not None)
    return dict(meetings)


def _members(equation: Equation, flat: FlatJaxpr, group_of: Sequence[int]) -> list[int]:
    """The operands that are laid out with the result, element by element."""
    (result, *_) = equation.results
    n_elements = flat.arrays[result].n_elements
    return [
        i
        for i in equation.operands
        if group_of[i] == group_of[result] and flat.arrays[i].n_elements == n_elements
    ]
