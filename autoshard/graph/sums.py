"""Where what ops make is added up: in other ops' sums, or along a batch at once."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from autoshard.graph.equations import FlatJaxpr
from autoshard.graph.liveness import Lives
from autoshard.graph.program import Op
from autoshard.graph.tying import places_in_blocks

__all__ = ["as_summed", "sum_targets"]

_LINEAR = {"add", "add_any", "copy", "reshape", "transpose", "convert_element_type"}


def as_summed(ops: Sequence[Op], lives: Lives) -> list[Op]:
    """The ops, told in which sums their results end."""
    told = []
    for index, op in enumerate(ops):
        alone = index not in lives.shared
        batch = _summed_batch(op, ops[lives.results.get(index, index)]) if alone else None
        addends = tuple(lives.sums.get(index, ()))
        told.append(replace(op, summed_batch=batch, addends=addends))
    return _counted_as_inner(told)


def _counted_as_inner(ops: Sequence[Op]) -> list[Op]:
    """The ops, where the last block's gradients change places with the first's in what sums read.

    Of a folded copy the first block stands for all but the last. Yet the gradient that leaves the
    first is the only one that no other block's is added to.
    """
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, place in enumerate(places_in_blocks(ops)):
        if ops[index].backward:
            alike[place].append(index)
    told = list(ops)
    for indices in alike.values():
        for index, other in zip(indices, reversed(indices), strict=True):
            told[index] = replace(ops[index], addends=ops[other].addends)
    return told


def _summed_batch(op: Op, last_reader: Op) -> int | None:
    """The batch factor of a matmul along which what reads its result sums it up."""
    if op.kind != "contraction" or last_reader.primitive != "reduce_sum" or not op.results:
        return None
    result, read = op.results[0], last_reader.operands[0]
    if result.group != read.group:
        return None
    summed = [
        factor
        for factor, label in zip(result.factors, read.factors, strict=True)
        if factor is not None
        and label in last_reader.reduced
        and all(factor in each.factors for each in op.operands)
    ]
    return summed[0] if len(summed) == 1 else None


def sum_targets(flat: FlatJaxpr) -> dict[int, int]:
    """Where each array's value is added up with others before anything else reads it.

    XLA reduces a sum of partial sums once, not each of them, so long as nothing but additions and
    moves stand between.
    """
    uses = flat.n_readers()
    target: dict[int, int] = {}
    for equation in reversed(flat.equations):
        if equation.primitive not in _LINEAR or not equation.results:
            continue
        result = equation.results[0]
        for operand in equation.operands:
            if uses[operand] == 1:
                target[operand] = target.get(result, result)
    return target
