"""Floating point operations of a matmul, a multiply-add counting two.

dot_general     2 x elements of the result x contracted elements
convolution     2 x elements of the result x elements of one filter
"""

import math
from typing import Any

__all__ = ["equation_flops", "window_size"]


def equation_flops(equation: Any) -> int:
    """Operations of one equation of a jaxpr; 0 for what is no matmul.

    Args:
        equation: a `jax.core.JaxprEqn`.
    """
    name = equation.primitive.name
    if name == "dot_general":
        contracted: tuple[int, ...] = equation.params["dimension_numbers"][0][0]
        left: tuple[int, ...] = equation.invars[0].aval.shape
        return 2 * _size(equation) * math.prod(left[dimension] for dimension in contracted)
    if name == "conv_general_dilated":
        filters: tuple[int, ...] = equation.invars[1].aval.shape
        n_outputs: int = filters[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(equation) * math.prod(filters) // n_outputs
    return 0


def window_size(equation: Any) -> int:
    """Elements of a convolution's filter along space, of one feature; 1 for any other equation.

    Args:
        equation: a `jax.core.JaxprEqn`.
    """
    if equation.primitive.name != "conv_general_dilated":
        return 1
    filters: tuple[int, ...] = equation.invars[1].aval.shape
    return math.prod(filters[dim] for dim in equation.params["dimension_numbers"].rhs_spec[2:])


def _size(equation: Any) -> int:
    shape: tuple[int, ...] = equation.outvars[0].aval.shape
    return math.prod(shape)
