"""Casts and transpositions, which compilers fuse into what makes or reads the array."""

from collections import Counter
from dataclasses import replace

from autoshard.graph.equations import FlatJaxpr

__all__ = ["held_arrays", "turned_weights", "with_narrow_results"]

_CAST = "convert_element_type"


def held_arrays(flat: FlatJaxpr) -> frozenset[int]:
    """The arguments, and casts of them, as mixed precision reads weights: there before any op."""
    held = set(flat.inputs)
    for equation in flat.equations:
        if equation.primitive == _CAST and held.issuperset(equation.operands):
            held.update(equation.results)
    return frozenset(held)


def turned_weights(flat: FlatJaxpr) -> dict[int, int]:
    """What is an argument transposed, for matmuls alone -> the argument, by identity.

    The TPU compiler has them read the argument itself before it partitions the step: then an
    argument that lies whole is not cut for a matmul, as its transposition may be.
    """
    n_readers, n_matmuls = flat.n_readers(), Counter[int]()
    for equation in flat.equations:
        if equation.link.kind == "contraction":
            n_matmuls.update(equation.operands)
    return {
        result: operand
        for equation in flat.equations
        if equation.primitive == "transpose"
        for operand, result in [(*equation.operands, *equation.results)]
        if operand in flat.inputs and n_readers[result] == n_matmuls[result]
    }


def with_narrow_results(flat: FlatJaxpr) -> FlatJaxpr:
    """A step whose matmuls and sums write what their results are cast to, if that alone is read.

    So TPU compilers do with the int32 sums of a matmul in int8, and with those of experts in
    float32. Partial sums of devices are added up after the cast too, in bfloat16.
    """
    readers = flat.n_readers()
    made_by, arrays = flat.made_by(), list(flat.arrays)
    for equation in flat.equations:
        if equation.primitive != _CAST or not made_by.keys() & set(equation.operands):
            continue
        (before,), (after,) = equation.operands, equation.results
        sums = made_by[before].link.kind in ("contraction", "reduction")
        if sums and readers[before] == 1 and arrays[after].itemsize < arrays[before].itemsize:
            arrays[before] = arrays[after]
    return replace(flat, arrays=tuple(arrays))
