"""Floating point operations of the matmuls of a traced program, before it is split.

The rest (elementwise, sums) is left out: under a hundredth in a transformer. A loop of known length
counts each turn, one of unknown length counts one.
"""

from collections.abc import Iterator
from typing import Any

from autoshard.graph.flops import equation_flops

__all__ = ["matmul_flops"]


def matmul_flops(jaxpr: Any) -> int:
    """Count the operations of a jaxpr, of the jaxprs inside it too.

    Args:
        jaxpr: a `jax.core.Jaxpr` or `ClosedJaxpr`.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        total += equation_flops(equation)
        turns = int(equation.params.get("length", 1)) if name == "scan" else 1
        inner = [matmul_flops(body) for body in _bodies(equation.params.values())]
        # Of the branches of a condition one runs.
        total += turns * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _bodies(parameters: Any) -> Iterator[Any]:
    for value in parameters:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _bodies(value)
