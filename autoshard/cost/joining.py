"""What it takes a TPU to cut arrays and join them, as the halves of rotary embeddings.

Halves that change places are cut, padded and added, and then copied into the order in which they
are read. So are halves that are interleaved; these are multiplied and added apart before. Where
devices share the width of heads they cut, join and multiply apart too, and copy nothing.

Nor is anything copied of what an all-reduce summed: it has the width of heads along the lanes of
its tiles, not the tokens.
"""

import math
from collections.abc import Callable, Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.partitioner import Choice
from autoshard.cost.single_rows import shard_seconds
from autoshard.cost.transfers import local_bytes
from autoshard.cost.turning import tile_rows
from autoshard.graph.makers import made_by
from autoshard.graph.program import Layout, Op
from autoshard.graph.splits import factors_split, layout_of
from autoshard.hardware.efficiency import TILE_ROWS

__all__ = ["CopiedHalves", "cutting_seconds", "joining_seconds"]

# Over the time to add up the elements: what it takes to join arrays that are kept; to cut, pad and
# add those that are not; to copy what that gives; and to multiply and add it. In 18 programs of
# Gemma, Llama, Mistral and Qwen for v5e the parts took 18, 8 and 14 ps an element.
_JOINED = 2
_CUT_AND_ADDED = 1.8
_COPIED = 0.8
_MULTIPLIED = 1.4

# The same where devices share the width: to cut it, and to join and multiply it. In four programs
# of Llama and Gemma for v5e 21 to 24 and 35 to 41 ps an element.
_SHARED_CUT = 2.4
_SHARED_JOINED = 4

# What a kernel may hold of what it reads and of what it writes, of each the next beside the one it
# works at. A copy of more is half as fast.
_WINDOWS_BYTES = 16 * 2**20


def joining_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to join its shares of some arrays, copies aside.

    Args:
        op: a concatenation or a stack.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    if not op.is_brief:
        passes: float = _JOINED
    elif _shares_width(op, choice):
        passes = _SHARED_JOINED
    else:
        passes = _CUT_AND_ADDED + (_MULTIPLIED if op.interleaves else 0)
    return passes * _results_seconds(op, choice, machine)


def cutting_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to cut its share of an array that nothing keeps.

    Args:
        op: a split, or slices of one array.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    if not _shares_width(op, choice):
        return 0.0
    return _SHARED_CUT * _results_seconds(op, choice, machine)


def _shares_width(op: Op, choice: Choice) -> bool:
    """Whether devices share the last dimension of what an op cuts or joins."""
    return (None, *op.operands[0].factors)[-1] in choice


def _results_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to add up its shares of what an op makes."""
    return sum(shard_seconds(made, layout_of(made, choice), machine) for made in op.results)


class CopiedHalves:
    """The copies of halves that a step joins; of one that neither trains nor decodes, on a TPU.

    Args:
        ops: of the step, in execution order.
        machine: what it runs on.
    """

    def __init__(self, ops: Sequence[Op], machine: Machine) -> None:
        self._machine = machine
        self._copied = [
            (op, made_by(ops, op.operands[0].group, before=index))
            for index, op in enumerate(ops)
            if op.primitive in ("stack", "concatenate") and op.is_brief and machine.compiles_for_tpu
        ]
        self._known: dict[tuple[int, Layout], float] = {}

    def seconds(self, layouts: Sequence[Layout], is_summed: Callable[[int], bool]) -> float:
        """What they take, in all blocks.

        Args:
            layouts: one a group.
            is_summed: whether an all-reduce sums what the op of an index makes.
        """
        total = 0.0
        for place, (op, maker) in enumerate(self._copied):
            if maker is not None and is_summed(maker):
                continue
            key = place, layouts[op.results[0].group]
            seconds = self._known.get(key)
            if seconds is None:
                seconds = self._known[key] = op.count * self._copy_seconds(op, key[1])
            total += seconds
        return total

    def _copy_seconds(self, op: Op, layout: Layout) -> float:
        """What one copy takes a device, of tiles that are full in part."""
        result, sizes = op.results[0], self._machine.axis_sizes
        if _shares_width(op, factors_split(result, layout, op.factor_sizes, sizes)):
            return 0.0
        n_bytes = local_bytes(result.n_bytes, layout, sizes)
        padding = TILE_ROWS / self._rows(op, layout) if op.interleaves else 1.0
        fits = 2 * n_bytes * (1 + padding) < _WINDOWS_BYTES
        passes = _COPIED * padding * (1 if fits else 2)
        return passes * shard_seconds(result, layout, self._machine)

    def _rows(self, op: Op, layout: Layout) -> int:
        """What a device has along the rows of a tile of interleaved halves: at least these two.

        The heads that share a key's where it has several of these, else the heads or the sequences,
        whichever are more.
        """
        sizes = self._machine.axis_sizes
        local = [
            (1 if factor is None else op.factor_sizes[factor])
            // math.prod(n for n, at in zip(sizes, layout, strict=True) if at == dim)
            for dim, factor in enumerate(op.results[0].factors)
        ]
        sequences, *heads = local[:1] + local[2:-2]
        sharing = min([op.interleaves, *heads])
        return max(2, tile_rows(sharing if sharing > 1 else max(sequences, *heads, 1)))
