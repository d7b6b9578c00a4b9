"""How long the arrays of a step are needed, in ops: up to the last that reads them.

The compiler fuses elementwise ops, moves, slices and broadcasts into what reads them, so that these
read in truth what such a chain is made of. Where one adds arrays of one size up and has several
readers, as a residual stream has, the sum is written, in the place of the one made last.

A GPU's matrix multiplication is a library call that nothing is fused into: what a chain makes for
it is written, and kept for the gradient that reads it too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.link import ADDING, PASSING
from autoshard.graph.program import Chain

__all__ = ["FUSED", "Lives", "read_lives"]

FUSED = frozenset({"broadcast", *PASSING, "slice"})
"""Kinds of link whose results the compiler does not write to memory."""

_COMPUTING = ("broadcast", "elementwise")


@dataclass(frozen=True, slots=True)
class Lives:
    """The lives of what ops make and read.

    Attributes:
        results: index of an op -> that of the last op that reads what it made; without those that
            nothing reads.
        operands: index of a matmul -> those of its operands that a fused chain makes.
        sums: index of an op -> for each written sum, as a residual stream's, of which its result is
            the part that is made last: the number of arrays that the sum reads.
        shared: ops of whose result alone several equations read.
    """

    results: dict[int, int] = field(default_factory=dict)
    operands: dict[int, dict[int, Chain]] = field(default_factory=dict)
    sums: dict[int, list[int]] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)


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
    reader.end()
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
        self._uses = _uses(flat)
        self._size = [array.n_elements for array in flat.arrays]
        self._size_made: dict[int, int] = {}
        self._made_of: dict[int, frozenset[int]] = {}
        self._chain: dict[int, int] = {}
        self._readers: dict[int, list[int]] = {}
        self._matmuls: set[int] = set()

    def fuse(self, equation: Equation) -> None:
        """An equation that is fused into its readers."""
        sources = self._sources(equation)
        result = equation.results[0]
        addends = self._addends(equation)
        summed = frozenset[int]().union(*addends)
        chain = self._chain.get(equation.operands[0]) if equation.operands else None
        if len(addends) > 1 and self._uses[result] > 1:
            self.lives.results.update(dict.fromkeys(sources - {max(summed)}, self.now))
            self.lives.sums.setdefault(max(summed), []).append(len(summed))
            sources, chain = frozenset({max(summed)}), None
        elif equation.link.kind in _COMPUTING and sources:
            chain = result
        self._note_shared(equation, sources)
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
        self._note_shared(equation, frozenset({index}))
        if equation.link.kind != "contraction":
            return
        self._matmuls.add(index)
        for identity in equation.operands:
            if identity in self._chain:
                self._readers.setdefault(identity, []).append(index)

    def end(self) -> None:
        """Note the chains, after the last equation."""
        together: dict[int, set[int]] = {}
        for identity, readers in self._readers.items():
            together.setdefault(self._chain[identity], set()).update(readers)
        chains = {end: self._chain_to(end, sorted(ops)) for end, ops in together.items()}
        for identity, readers in self._readers.items():
            for index in readers:
                self.lives.operands.setdefault(index, {})[identity] = chains[self._chain[identity]]

    def _addends(self, equation: Equation) -> list[frozenset[int]]:
        """What each term of a sum is made of, of the sum's size; nothing where terms share that."""
        if equation.primitive not in ADDING:
            return []
        size = self._size[equation.results[0]]
        terms = [
            frozenset(op for op in self._made_of.get(i, ()) if self._size_made[op] == size)
            for i in equation.operands
        ]
        terms = [term for term in terms if term]
        return terms if len(frozenset().union(*terms)) == sum(map(len, terms)) else []

    def _note_shared(self, equation: Equation, sources: frozenset[int]) -> None:
        """Remember where several equations read what one op alone has made."""
        if len(sources) == 1 and any(self._uses[made] > 1 for made in equation.results):
            self.lives.shared.update(sources)

    def _chain_to(self, end: int, readers: Sequence[int]) -> Chain:
        """The chain that ends in an array."""
        sources = self._made_of[end]
        follows = all(
            op in self._matmuls and self._size_made[op] == self._size[end] for op in sources
        )
        return Chain(
            end=end,
            readers=tuple(readers),
            follows_matmul=follows,
            takes_place=follows and max(sources) not in self.lives.shared,
        )

    def _sources(self, equation: Equation) -> frozenset[int]:
        """The ops whose results an equation reads in truth."""
        parts = (self._made_of.get(identity, frozenset()) for identity in equation.operands)
        return frozenset[int]().union(*parts)


def _uses(flat: FlatJaxpr) -> Counter[int]:
    """How often each array is read. What one equation reads and passes on is read as its result."""
    uses = Counter(i for equation in flat.equations for i in equation.operands)
    for equation in reversed(flat.equations):
        passes = equation.link.kind in PASSING and len(equation.operands) == 1
        if passes and uses[equation.operands[0]] == 1:
            uses[equation.operands[0]] = uses[equation.results[0]]
    return uses
