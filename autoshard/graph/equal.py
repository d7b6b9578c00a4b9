"""Makes one of what does the same, as a compiler for TPUs does before it partitions a step.

Equal equations of a layer are one, and what broadcasts an array to one shape makes one array. So
keys and values that one mask is laid over are laid out alike, and so are queries and keys of one
shape that are turned by one rotary embedding. What blocks of one stack have in common is one too;
an encoder and a decoder whose angles are the same were laid out each on its own.

What is made of constants alone stays apart: Shardy makes that anew for each reader, so that no
layout spreads through it (its `constant_or_scalar_splitter.cc`). Elementwise ops, broadcasts,
slices and reshapes keep constants constant, and nothing else does: a concatenation ends it.
"""

from collections.abc import Collection, Hashable
from dataclasses import replace

from autoshard.graph.equations import ArrayType, Equation, FlatJaxpr, live_equations
from autoshard.graph.link import numbered
from autoshard.graph.rules import LINK_RULES
from autoshard.model.outputs import MARK

__all__ = ["merge_equal"]

_KEEPS = {"iota", "reshape", "slice", "squeeze", "expand_dims"}


def merge_equal(flat: FlatJaxpr, own: Collection[int]) -> tuple[FlatJaxpr, frozenset[int]]:
    """A step in which no two equations of a layer do the same, but for what constants make.

    Args:
        flat: the step.
        own: identities of its weights, and of other arguments that layers have of their own.

    Returns:
        The step; and the arrays, by identity, that blocks of a stack have in common, for nothing of
        their own is in them. So the angles of a rotary embedding, which positions alone decide:
        they are made once. What constants make stays apart in each block.
    """
    merger = _Merger(flat, own)
    for equation in flat.equations:
        merger.add(equation)
    outputs = tuple(i if i is None else merger.same.get(i, i) for i in flat.outputs)
    merged = replace(
        flat,
        arrays=tuple(merger.arrays),
        equations=live_equations(merger.equations, outputs),
        outputs=outputs,
    )
    return merged, frozenset(merger.common)


class _Merger:
    """Goes through the equations in order; see `merge_equal`.

    Attributes:
        arrays, equations: those of the merged step.
        same: identity of an array that is left out -> the array that takes its place.
        common: the arrays that blocks have in common.
    """

    def __init__(self, flat: FlatJaxpr, own: Collection[int]) -> None:
        self.arrays: list[ArrayType] = list(flat.arrays)
        self.equations: list[Equation] = []
        self.same: dict[int, int] = {}
        self.common: set[int] = set()
        # What is made of anything that is a layer's own, or in a way that is not known.
        self._varies = set(own)
        # What an equation does -> the results of the first one that does it.
        self._results: dict[Hashable, tuple[int, ...]] = {}
        # Identity of what is made of constants alone -> its value: which equation's, which result.
        self._constants: dict[int, tuple[int, int]] = {}
        self._numbers: dict[Hashable, int] = {}

    def add(self, equation: Equation) -> None:
        """Take over an equation, unless its results are there already, or another block's are."""
        operands = tuple(self.same.get(identity, identity) for identity in equation.operands)
        equation = replace(equation, operands=operands)
        is_constant = all(i in self._constants for i in operands) and _keeps_constants(equation)
        if equation.does is None or not self._varies.isdisjoint(operands):
            self._varies.update(equation.results)
        elif not is_constant:
            self.common.update(equation.results)
        is_own = not self._varies.isdisjoint(equation.results)
        look = self._look(equation, equation.layer if is_own else equation.place)
        if look is None:
            self.equations.append(equation)
        elif is_constant:
            number = self._numbers.setdefault(look, len(self._numbers))
            values = ((result, (number, i)) for i, result in enumerate(equation.results))
            self._constants.update(values)
            self.equations.append(equation)
        elif look in self._results:
            self.same.update(zip(equation.results, self._results[look], strict=True))
        else:
            self._results[look] = equation.results
            self.equations.append(self._widened(equation))

    def _look(self, equation: Equation, layer: str) -> Hashable | None:
        """What two equations share that do the same; None where that is not known."""
        if equation.does is None or equation.primitive == MARK:
            return None
        read = tuple(self._constants.get(identity, identity) for identity in equation.operands)
        return (equation.primitive, equation.does, read, layer, equation.backward)

    def _widened(self, equation: Equation) -> Equation:
        """An elementwise equation with operands that are as large as its result."""
        if equation.link.kind != "elementwise" or len(equation.results) > 1:
            return equation
        shape = self.arrays[equation.results[0]].shape
        operands, labels = list(equation.operands), list(equation.link.operands)
        for position, identity in enumerate(equation.operands):
            array = self.arrays[identity]
            if identity in self._constants or array.shape == shape or array.n_elements == 1:
                continue
            operands[position] = self._broadcast(identity, shape, equation)
            labels[position] = numbered(shape)
        link = replace(equation.link, operands=tuple(labels))
        return replace(equation, operands=tuple(operands), link=link)

    def _broadcast(self, identity: int, shape: tuple[int, ...], reader: Equation) -> int:
        """An array broadcast to the shape of what reads it, dimension for dimension."""
        look = (identity, shape, reader.layer, reader.backward)
        if look not in self._results:
            array = self.arrays[identity]
            dims = {"broadcast_dimensions": range(len(shape))}
            self._results[look] = (len(self.arrays),)
            self.arrays.append(replace(array, shape=shape))
            self.equations.append(
                Equation(
                    primitive="broadcast_in_dim",
                    operands=(identity,),
                    results=self._results[look],
                    link=LINK_RULES["broadcast_in_dim"]([array.shape], [shape], dims),
                    flops=0,
                    layer=reader.layer,
                    place=reader.place,
                    backward=reader.backward,
                )
            )
        return self._results[look][0]


def _keeps_constants(equation: Equation) -> bool:
    return equation.link.kind in ("elementwise", "broadcast") or equation.primitive in _KEEPS
