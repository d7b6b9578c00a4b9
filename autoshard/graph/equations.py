"""A step without calls: its arrays, and the equations that make them.

Knows nothing of JAX: shapes, factors and names only.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from autoshard.graph.link import Link

__all__ = ["ArrayType", "Equation", "FlatJaxpr", "Mark", "live_equations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayType:
    """Shape and bytes an element of one array."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def n_elements(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.n_elements * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """One equation of the step.

    Attributes:
        operands, results: identities of the arrays; literals are left out.
        link: its factors; `link.operands` matches `operands`.
        flops: floating point operations, multiply-add counting two; 0 for what is not a matmul.
        window: elements of a convolution's filter, see `autoshard.graph.flops`; 1 for a matmul.
        n_kernels: of a loop, the kernels of all its turns; 1 for all else.
        layer: path of the layer, without the transformations around it.
        place: the same for each block that has such a layer, once that is known: see `with_places`.
        backward: whether the transposed (gradient) program holds it.
        does: its parameters and literals, or None where two of them cannot be compared.
    """

    primitive: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    link: Link
    flops: int
    window: int = 1
    n_kernels: int = 1
    layer: str
    place: str = ""
    backward: bool
    does: Hashable = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An array that Keras would ask a LayoutMap about.

    Attributes:
        path: path of the layer output.
        identity: the array.
        backward: whether it is the output's gradient.
    """

    path: str
    identity: int
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatJaxpr:
    """A step without calls.

    Attributes:
        arrays: type of each array, by identity.
        equations: in execution order.
        inputs: identity of each argument.
        outputs: identity of each result, or None for a constant.
        marks: the layer outputs.
    """

    arrays: tuple[ArrayType, ...]
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    marks: tuple[Mark, ...] = ()

    def made_by(self) -> dict[int, Equation]:
        """Identity of an array -> the equation that makes it; without those that are there."""
        return {result: equation for equation in self.equations for result in equation.results}

    def n_readers(self) -> Counter[int]:
        """Identity of an array -> how often equations read it and the step returns it."""
        readers = Counter(i for equation in self.equations for i in equation.operands)
        readers.update(identity for identity in self.outputs if identity is not None)
        return readers


def live_equations(
    equations: Sequence[Equation], outputs: Sequence[int | None]
) -> tuple[Equation, ...]:
    """The equations that an output depends on: the others are no part of the compiled program."""
    needed = {identity for identity in outputs if identity is not None}
    live = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.results):
            needed.update(equation.operands)
            live.append(equation)
    return tuple(reversed(live))
