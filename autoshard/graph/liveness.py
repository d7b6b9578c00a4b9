"""How long the arrays of a step are needed, in ops: up to the last that reads them.

The compiler fuses elementwise ops, moves, slices and broadcasts into what reads them, so that these
read in truth what such a chain is made of. Where one adds arrays of one size up and has several
readers, as a residual stream has, the sum is written, in the place of the one made last.

A GPU's matrix multiplication is a library call that nothing is fused into: what a chain makes for
it is written, and kept for the gradient that reads it too.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoshard.graph.jaxpr import Equation, FlatJaxpr

__all__ = ["FUSED", "Lives", "read_lives"]

FUSED = frozenset({"broadcast", "elementwise", "reshape", "slice"})
"""Kinds of link whose results the compiler does not write to memory."""

_COMPUTING = ("broadcast", "elementwise")


@dataclass(frozen=True, slots=True)
class Lives:
    """The lives of what ops make and read.

    Attributes:
        results: index of an op -> that of the last op that reads what it made; without those that
            nothing reads.
        operands: index of a matmul -> operands that it is the first to read of what a fused chain
            makes, each with the last matmul that reads the same.
    """

    results: dict[int, int] = field(default_factory=dict)
    operands: dict[int, dict[int, int]] = field(default_factory=dict)


def read_lives(flat: FlatJaxpr, op_of: Mapping[int, int]) -> Lives:
    """Follow each array from where it is made to where it is read.

    Args:
        flat: the step.
        op_of: position of an equation -> index of its op, in the order of execution; equations
            that laying out leaves nothing to decide for have none.
    """
    reader = _Reader(flat)
    for position, equation in enumerate(flat.equations):
        index = op_of.get(position)
        reader.now = reader.now if index is None else index
        if equation.link.kind in FUSED:
            reader.fuse(equation)
        else:
            reader.run(equation, index)
    return reader.lives


class _Reader:
    """Walks the equations and knows what each array so far is made of.

    Attributes:
        lives: what is known so far.
        now: the op that runs, or ran last.
    """

    def __init__(self, flat: FlatJaxpr) -> None:
        self.lives = Lives()
        self.now = 0
        self._uses = Counter(i for equation in flat.equations for i in equation.operands)
        self._size = [array.n_elements for array in flat.arrays]
        self._size_made: dict[int, int] = {}
        self._made_of: dict[int, frozenset[int]] = {}
        self._chain: dict[int, int] = {}
        self._first: dict[int, tuple[int, int]] = {}

    def fuse(self, equation: Equation) -> None:
        """An equation that is fused into its readers."""
        sources = self._sources(equation)
        result = equation.results[0]
        summed = {op for op in sources if self._size_made[op] == self._size[result]}
        chain = self._chain.get(equation.operands[0]) if equation.operands else None
        if len(summed) > 1 and self._uses[result] > 1:
            self.lives.results.update(dict.fromkeys(sources - {max(summed)}, self.now))
            sources, chain = frozenset({max(summed)}), None
        elif equation.link.kind in _COMPUTING and sources:
            chain = result
        for made in equation.results:
            self._made_of[made] = sources
            if chain is not None:
                self._chain[made] = chain

    def run(self, equation: Equation, index: int | None) -> None:
        """An equation that reads and writes memory."""
        self.lives.results.update(dict.fromkeys(self._sources(equation), self.now))
        if index is None:
            return
        self._size_made[index] = self._size[equation.results[0]]
        self._made_of.update(dict.fromkeys(equation.results, frozenset({index})))
        if equation.link.kind != "contraction":
            return
        for identity in equation.operands:
            if identity in self._chain:
                first, as_read = self._first.setdefault(self._chain[identity], (index, identity))
                self.lives.operands.setdefault(first, {})[as_read] = index

    def _sources(self, equation: Equation) -> frozenset[int]:
        """The ops whose results an equation reads in truth."""
        parts = (self._made_of.get(identity, frozenset()) for identity in equation.operands)
        return frozenset[int]().union(*parts)
