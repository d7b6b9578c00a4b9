"""Ties the repeated blocks of a traced copy: what stands at one place in each is one decision.

The copy holds two periods of blocks; the first stands for all but the last. Ops of different blocks
correspond where the layer's place in its block, the direction, the op itself and its place among
such ops of the layer are the same. Their arrays' groups are then tied. This is by block and place,
never by what an op merely looks like: look-alikes elsewhere may want another layout.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import networkx as nx

from autoshard.graph.program import Op, Program

__all__ = ["TiedOp", "places_in_blocks", "price_look", "tie_blocks"]

TiedOp = tuple[Op, tuple[int, ...], int]


def price_look(op: Op) -> tuple[object, ...]:
    """Everything that decides an op's price but the layouts of its arrays."""
    repeated = tuple(array.repetition for array in op.results)
    read = (op.is_returned, op.is_brief, op.slicing, op.scores, op.interleaving, repeated)
    return _look(op), op.addends, op.summed_batch, read


def _look(op: Op) -> tuple[object, ...]:
    """What an op is, whatever reads its result: the last block's is read by other ops."""
    return (
        op.primitive,
        op.kind,
        tuple(
            (a.n_bytes, a.itemsize, a.factors, a.inner, a.is_held, a.repetition, a.reads)
            for a in op.operands
        ),
        tuple((a.n_bytes, a.itemsize, a.factors, a.inner) for a in op.results),
        op.factor_sizes,
        op.reduced,
        op.shifted,
        op.gathered,
        op.flops,
        op.window,
        op.n_kernels,
        op.backward,
        op.moves_cache,
        op.is_fused,
        op.vectors,
    )


def places_in_blocks(ops: Sequence[Op]) -> list[Hashable]:
    """What an op has in common with those of other blocks that it corresponds to, for each op."""
    order: Counter[tuple[object, ...]] = Counter()
    places: list[Hashable] = []
    for op in ops:
        look = _look(op)
        places.append((op.place, look, order[op.layer, look]))
        order[op.layer, look] += 1
    return places


def tie_blocks(program: Program) -> tuple[tuple[int, ...], tuple[TiedOp, ...]]:
    """Fold a program over its repeated blocks.

    Returns:
        For each group the group that stands for it; and the ops that are left: each with the
        groups that stand for its operands and results, and its count in the whole model.
    """
    firsts: dict[Hashable, Op] = {}
    ties = nx.Graph()
    ties.add_nodes_from(range(len(program.groups)))
    for place, op in zip(places_in_blocks(program.ops), program.ops, strict=True):
        first = firsts.setdefault(place, op)
        pairs = zip(first.arrays, op.arrays, strict=True)
        ties.add_edges_from(
            (a.group, b.group)
            for a, b in pairs
            if program.groups[a.group].sizes == program.groups[b.group].sizes
        )
    stands_for = list(range(len(program.groups)))
    for component in nx.connected_components(ties):
        for group in component:
            stands_for[group] = min(component)
    return tuple(stands_for), tuple(_merged(program, stands_for))


def _merged(program: Program, stands_for: list[int]) -> list[TiedOp]:
    """Ops that do the same to the same tied groups become one."""
    counts: Counter[tuple[object, ...]] = Counter()
    first: dict[tuple[object, ...], tuple[Op, tuple[int, ...]]] = {}
    for op in program.ops:
        groups = tuple(stands_for[group] for group in op.groups)
        key = (price_look(op), groups)
        first.setdefault(key, (op, groups))
        counts[key] += op.count
    return [(op, groups, counts[key]) for key, (op, groups) in first.items()]
