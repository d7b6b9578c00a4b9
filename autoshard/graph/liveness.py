"""How long the result of an op is needed: up to the last op that reads it.

The compiler fuses elementwise ops, moves, slices and broadcasts into what reads them, so that these
read in truth what such a chain is made of. Where one adds arrays of one size up and has several
readers, as a residual stream has, the sum is written, in the place of the one made last.
"""

from collections import Counter
from collections.abc import Mapping

from autoshard.graph.jaxpr import FlatJaxpr

__all__ = ["FUSED", "last_readers"]

FUSED = frozenset({"broadcast", "elementwise", "reshape", "slice"})
"""Kinds of link whose results the compiler does not write to memory."""


def last_readers(flat: FlatJaxpr, op_of: Mapping[int, int]) -> dict[int, int]:
    """Which op reads the result of each op last.

    Args:
        flat: the step.
        op_of: position of an equation -> index of its op, in the order of execution; equations
            that laying out leaves nothing to decide for have none.

    Returns:
        Index of an op -> index of the last that reads what it made; without those that nothing
        reads.
    """
    uses = Counter(identity for equation in flat.equations for identity in equation.operands)
    n_elements = [array.n_elements for array in flat.arrays]
    made_by: dict[int, frozenset[int]] = {}
    size: dict[int, int] = {}
    last: dict[int, int] = {}
    now = 0
    for position, equation in enumerate(flat.equations):
        now = op_of.get(position, now)
        sources = frozenset().union(*(made_by.get(i, frozenset()) for i in equation.operands))
        if equation.link.kind in FUSED:
            result = equation.results[0]
            summed = {op for op in sources if size[op] == n_elements[result]}
            if len(summed) > 1 and uses[result] > 1:
                read, sources = sources - {max(summed)}, frozenset({max(summed)})
                last.update(dict.fromkeys(read, now))
        else:
            last.update(dict.fromkeys(sources, now))
            sources = frozenset({op_of[position]} if position in op_of else ())
            size.update(dict.fromkeys(sources, n_elements[equation.results[0]]))
        made_by.update(dict.fromkeys(equation.results, sources))
    return last
