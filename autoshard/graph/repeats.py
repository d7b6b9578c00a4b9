"""The heads of keys and values, repeated for the heads of the query that share them.

A model repeats them in a dimension beside theirs, which it then merges with theirs.
"""

from collections.abc import Iterable

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.program import Repetition

__all__ = ["read_repetitions"]


def read_repetitions(flat: FlatJaxpr) -> dict[int, Repetition]:
    """Identity of an array that matmuls read -> how it repeats what it is made of, by its own dims.

    Args:
        flat: the step.
    """
    made_by = flat.made_by()
    found: dict[int, tuple[int, int]] = {}
    readers: dict[int, list[Equation]] = {}
    for equation in flat.equations:
        if equation.primitive == "reshape" and made_by.keys() & set(equation.operands):
            (repeated,), (result,) = equation.operands, equation.results
            dim = _merged_into(made_by[repeated], equation)
            if dim is not None:
                (source,) = made_by[repeated].operands
                times = flat.arrays[repeated].n_elements // flat.arrays[source].n_elements
                found[result] = dim, times
        elif equation.link.kind == "contraction":
            for identity in found.keys() & set(equation.operands):
                readers.setdefault(identity, []).append(equation)
    return {
        identity: Repetition(
            dim=dim,
            width=len(flat.arrays[identity].shape) - 1,
            times=times,
            for_rows=_are_rows(identity, readers[identity]),
        )
        for identity, (dim, times) in found.items()
        if identity in readers
    }


def _merged_into(broadcast: Equation, reshape: Equation) -> int | None:
    """The dimension of the reshape's result that has the new one of a broadcast for its minor part.

    None where it does anything else, or where that dimension is the last.
    """
    if broadcast.primitive != "broadcast_in_dim" or len(broadcast.operands) != 1:
        return None
    (source,), (repeated,) = broadcast.link.operands, broadcast.link.results
    (before,), (after,) = reshape.link.operands, reshape.link.results
    new = [at for at, label in enumerate(repeated) if label is not None and label not in source]
    if len(new) != 1 or new[0] == 0 or before[new[0]] in {*after} - {None}:
        return None
    major = before[new[0] - 1]
    return after.index(major) if major is not None and major in after[:-1] else None


def _are_rows(identity: int, readers: Iterable[Equation]) -> bool:
    """Whether no other operand of these matmuls has a dimension that the array lacks."""
    for reader in readers:
        own = reader.link.operands[reader.operands.index(identity)]
        if any({*labels} - {*own, None} for labels in reader.link.operands):
            return False
    return True
