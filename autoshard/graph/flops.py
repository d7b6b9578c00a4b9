"""Floating point operations of the matmuls of a traced program, a multiply-add counting two.

dot_general     2 x elements of the result x contracted elements
convolution     2 x elements of the result x elements of one filter

The rest (elementwise, sums) is left out: under a hundredth in a transformer. A loop of known length
counts each turn, one of unknown length counts one.
"""

import math
from collections.abc import Iterator
from typing import Any

__all__ = ["equation_flops", "matmul_flops", "window_size"]


def matmul_flops(jaxpr: Any, *, zeros: bool = False) -> int:
    """Operations of a jaxpr before it is split, those of the jaxprs inside it too.

    Args:
        jaxpr: a `jax.core.Jaxpr` or `ClosedJaxpr`.
        zeros: as for `equation_flops`.
    """
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return sum(equation_flops(equation, zeros=zeros) for equation in equations)


def equation_flops(equation: Any, *, zeros: bool = True) -> int:
    """Operations of one equation of a jaxpr; 0 where it holds no matmul.

    Args:
        equation: a `jax.core.JaxprEqn`.
        zeros: whether those count that multiply the zeros which the gradient of a strided
            convolution has between its values. No model needs them, but TPUs compute them: a
            filter of 3 x 3 takes as long with a stride of two as with one.
    """
    name = equation.primitive.name
    if name == "dot_general":
        contracted: tuple[int, ...] = equation.params["dimension_numbers"][0][0]
        left: tuple[int, ...] = equation.invars[0].aval.shape
        return 2 * _size(equation) * math.prod(left[dimension] for dimension in contracted)
    if name == "conv_general_dilated":
        filters: tuple[int, ...] = equation.invars[1].aval.shape
        n_outputs: int = filters[equation.params["dimension_numbers"].rhs_spec[0]]
        spread = 1 if zeros else math.prod(equation.params["lhs_dilation"])
        return 2 * _size(equation) * math.prod(filters) // n_outputs // spread
    turns = int(equation.params.get("length", 1)) if name == "scan" else 1
    inner = [matmul_flops(body, zeros=zeros) for body in _bodies(equation.params.values())]
    # Of the branches of a condition one runs.
    return turns * (max(inner, default=0) if name == "cond" else sum(inner))


def window_size(equation: Any) -> int:
    """Elements of a filter beside those of features that are summed; 1 for no convolution.

    Those are along space, and in groups the features of one.

    Args:
        equation: a `jax.core.JaxprEqn`.
    """
    if equation.primitive.name != "conv_general_dilated":
        return 1
    filters: tuple[int, ...] = equation.invars[1].aval.shape
    first = 1 if equation.params["feature_group_count"] > 1 else 2
    return math.prod(filters[dim] for dim in equation.params["dimension_numbers"].rhs_spec[first:])


def _size(equation: Any) -> int:
    shape: tuple[int, ...] = equation.outvars[0].aval.shape
    return math.prod(shape)


def _bodies(parameters: Any) -> Iterator[Any]:
    for value in parameters:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _bodies(value)
