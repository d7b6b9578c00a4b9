"""Casts: compilers fuse them into what makes their operand, or into what reads their result."""

from dataclasses import replace

from autoshard.graph.jaxpr import FlatJaxpr

__all__ = ["held_arrays", "with_narrow_results"]

_CAST = "convert_element_type"


def held_arrays(flat: FlatJaxpr) -> frozenset[int]:
    """The arguments, and casts of them, as mixed precision reads weights: there before any op."""
    held = set(flat.inputs)
    for equation in flat.equations:
        if equation.primitive == _CAST and held.issuperset(equation.operands):
            held.update(equation.results)
    return frozenset(held)


def with_narrow_results(flat: FlatJaxpr) -> FlatJaxpr:
    """A step whose matmuls write what their results are cast to, where that alone is read.

    So TPU compilers do with the int32 sums of a matmul in int8. Partial sums of devices are added
    up after the cast too, in bfloat16.
    """
    readers = flat.n_readers()
    made_by, arrays = flat.made_by(), list(flat.arrays)
    for equation in flat.equations:
        if equation.primitive != _CAST or not made_by.keys() & set(equation.operands):
            continue
        (before,), (after,) = equation.operands, equation.results
        is_matmul = made_by[before].link.kind == "contraction"
        if is_matmul and readers[before] == 1 and arrays[after].itemsize < arrays[before].itemsize:
            arrays[before] = arrays[after]
    return replace(flat, arrays=tuple(arrays))
