"""Floating point operations of the matmuls of a traced program, before it is split.

    dot_general     2 x elements of the result x contracted elements
    convolution     2 x elements of the result x elements of one filter

The rest (elementwise, sums) is left out: under a hundredth in a transformer. A loop of known length
counts each turn, one of unknown length counts one.
"""

import math
from collections.abc import Iterator
from typing import Any

__all__ = ["matmul_flops"]


def matmul_flops(jaxpr: Any) -> int:
    """Count the operations of a jaxpr, of the jaxprs inside it too.

    Args:
        jaxpr: a `jax.core.Jaxpr` or `ClosedJaxpr`.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        turns = int(equation.params.get("length", 1)) if name == "scan" else 1
        inner = [matmul_flops(body) for body in _bodies(equation.params.values())]
        # Of the branches of a condition one runs.
        total += turns * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _dot(equation: Any) -> int:
    contracted: tuple[int, ...] = equation.params["dimension_numbers"][0][0]
    left: tuple[int, ...] = equation.invars[0].aval.shape
    return 2 * _size(equation) * math.prod(left[dimension] for dimension in contracted)


def _convolution(equation: Any) -> int:
    filters: tuple[int, ...] = equation.invars[1].aval.shape
    n_outputs: int = filters[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * _size(equation) * math.prod(filters) // n_outputs


def _size(equation: Any) -> int:
    shape: tuple[int, ...] = equation.outvars[0].aval.shape
    return math.prod(shape)


def _bodies(parameters: Any) -> Iterator[Any]:
    for value in parameters:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _bodies(value)
