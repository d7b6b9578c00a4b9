"""Reads a jaxpr into flat equations: calls inlined, arrays numbered, layers named.

The result knows nothing of JAX any more: shapes, factors and names only.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.graph.flops import equation_flops, window_size
from autoshard.graph.link import Link
from autoshard.graph.rules import link_of, unknown_link
from autoshard.model.outputs import MARK

__all__ = ["ArrayType", "Equation", "FlatJaxpr", "Mark", "live_equations", "read_jaxpr"]

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat",
          "checkpoint", "remat2", "custom_vjp_call_jaxpr"}  # fmt: skip
_TRANSFORM = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint|rematted_computation)\(")


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
        readers.update(_identities(self.outputs))
        return readers


class _Reader:
    """Walks nested jaxprs, keeping the numbering of arrays; see `read_jaxpr`."""

    def __init__(self) -> None:
        self.arrays: list[ArrayType] = []
        self.equations: list[Equation] = []
        self.marks: list[Mark] = []

    def new(self, variable: Any) -> int:
        aval = variable.aval
        # Extended dtypes (random keys) have no itemsize of their own.
        itemsize = getattr(aval.dtype, "itemsize", 4)
        self.arrays.append(ArrayType(shape=tuple(map(int, aval.shape)), itemsize=itemsize))
        return len(self.arrays) - 1

    def walk(self, jaxpr: Any, known: dict[Any, int | None], prefix: str) -> list[int | None]:
        for equation in jaxpr.eqns:
            stack = "/".join(filter(None, (prefix, str(equation.source_info.name_stack))))
            inner = _called(equation) if equation.primitive.name in _CALLS else None
            if inner is None:
                self.add(equation, known, stack)
                continue
            scope: dict[Any, int | None] = {}
            for variable, operand in zip(inner.invars, equation.invars, strict=True):
                scope[variable] = _identity(operand, known)
            for variable in inner.constvars:
                scope[variable] = self.new(variable)
            outs = self.walk(inner, scope, stack)
            known.update(zip(equation.outvars, outs, strict=True))
        return [_identity(variable, known) for variable in jaxpr.outvars]

    def add(self, equation: Any, known: dict[Any, int | None], stack: str) -> None:
        name = equation.primitive.name
        shapes = [tuple(map(int, v.aval.shape)) for v in equation.invars]
        out_shapes = [tuple(map(int, v.aval.shape)) for v in equation.outvars]
        if all(0 in shape for shape in out_shapes):
            known.update(dict.fromkeys(equation.outvars))  # arrays of no elements: no work
            return
        layer, backward = _layer(stack)
        # Offsets that are constants make it a slice, for the compiler too.
        if name == "dynamic_slice" and all(hasattr(v, "val") for v in equation.invars[1:]):
            name, shapes = "slice", shapes[:1]
        link = link_of(name, shapes, out_shapes, equation.params)
        link = link or unknown_link(shapes, out_shapes)
        results: list[int] = []
        for variable in equation.outvars:
            results.append(self.new(variable))
            known[variable] = results[-1]
        identities = enumerate(_identity(v, known) for v in equation.invars)
        present = [(i, identity) for i, identity in identities if identity is not None]
        if name == MARK:
            path = equation.params["path"]
            self.marks.append(Mark(path=path, identity=results[0], backward=backward))
        self.equations.append(
            Equation(
                primitive=name,
                operands=tuple(identity for _, identity in present),
                results=tuple(results),
                link=replace(
                    link,
                    operands=tuple(link.operands[i] for i, _ in present if i < len(link.operands)),
                ),
                flops=equation_flops(equation),
                window=window_size(equation),
                layer=layer,
                backward=backward,
                does=_does(equation),
            )
        )


def _does(equation: Any) -> Hashable | None:
    """What two equations of one primitive and of the same operands share that do the same."""
    literals = tuple(
        (str(v.aval), str(v.val)) if hasattr(v, "val") else None for v in equation.invars
    )
    does = (tuple(sorted(equation.params.items())), literals)
    try:
        hash(does)
    except TypeError:
        return None
    return does


def _called(equation: Any) -> Any:
    """The jaxpr that a call runs, or None where it cannot be inlined."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _identity(variable: Any, known: dict[Any, int | None]) -> int | None:
    return None if hasattr(variable, "val") else known.get(variable)


def _layer(stack: str) -> tuple[str, bool]:
    """Path of the layer and whether the equation belongs to the gradient.

    >>> _layer("transpose(jvp(gemma_backbone))/decoder_block_1/attention/query/btd,ndh->btnh")
    ('gemma_backbone/decoder_block_1/attention/query', True)
    """
    backward = "transpose(" in stack
    parts = [part.rstrip(")") for part in _TRANSFORM.sub("", stack).split("/")]
    return "/".join(part for part in parts if part and "->" not in part), backward


def read_jaxpr(closed: Any) -> FlatJaxpr:
    """Flatten a `jax.core.ClosedJaxpr`.

    Args:
        closed: the traced step, as `jax.make_jaxpr` returns it.

    Returns:
        Its equations in order, calls inlined. A primitive without a rule is of kind `unknown` and
        taken to need its operands whole.
    """
    reader = _Reader()
    known: dict[Any, int | None] = {v: reader.new(v) for v in closed.jaxpr.invars}
    inputs = tuple(_identities(known.values()))
    known.update({v: None for v in closed.jaxpr.invars if 0 in v.aval.shape})
    known.update({v: reader.new(v) for v in closed.jaxpr.constvars})
    outputs = tuple(reader.walk(closed.jaxpr, known, ""))
    equations = live_equations(reader.equations, outputs)
    made = {result for equation in equations for result in equation.results}
    return FlatJaxpr(
        arrays=tuple(reader.arrays),
        equations=equations,
        inputs=inputs,
        outputs=outputs,
        marks=tuple(mark for mark in reader.marks if mark.identity in made),
    )


def _identities(values: Iterable[int | None]) -> Iterator[int]:
    return (value for value in values if value is not None)


def live_equations(
    equations: Sequence[Equation], outputs: Sequence[int | None]
) -> tuple[Equation, ...]:
    """The equations that an output depends on: the others are no part of the compiled program."""
    needed = set(_identities(outputs))
    live = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.results):
            needed.update(equation.operands)
            live.append(equation)
    return tuple(reversed(live))
