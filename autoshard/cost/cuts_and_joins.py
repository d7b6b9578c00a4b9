"""What it takes a TPU to cut arrays and join them, as the halves of rotary embeddings.

What is joined is cut, padded and added, and then copied into the order in which it is read. Halves
that are interleaved are multiplied and added apart before. Where devices share the width of heads
they cut, join and multiply apart too, and copy nothing.

Nor is anything copied of what an all-reduce summed: it has the width of heads along the lanes of
its tiles, not the tokens.
"""

from collections.abc import Callable, Sequence

from autoshard.cost.machine import Machine
from autoshard.cost.shards import Choice, local_bytes, local_sizes
from autoshard.cost.single_rows import shard_seconds
from autoshard.cost.transposing import tile_rows
from autoshard.graph.producers import made_by
from autoshard.graph.program import Array, Interleaving, Layout, Op
from autoshard.graph.splits import factors_split, layout_of
from autoshard.hardware.efficiency import KERNEL_SECONDS, TILE_ROWS

__all__ = ["JoinedCopies", "cutting_seconds", "joining_seconds"]

# Over the time to add up the elements: what it takes to join arrays that are kept; to cut, pad and
# add those that are not; to copy what that gives; and to multiply and add what is interleaved. In
# 18 programs of Gemma, Llama, Mistral and Qwen for v5e the last three took 17 to 22, 7 to 8 and 10
# to 16 ps an element.
_JOINED = 2
_CUT_AND_ADDED = 1.8
_COPIED = 0.8
_MULTIPLIED = 1.4

# The same where devices share the width: to cut it, and to join and multiply it. In four programs
# of Llama and Gemma for v5e 21 to 24 and 35 to 41 ps an element.
_SHARED_CUT = 2.4
_SHARED_JOINED = 4

# What XLA gives a kernel of the vector memory of a v5e, for what it reads and what it writes, each
# twice. In the same programs copies that need more were half as fast.
_KERNEL_BYTES = 16 * 2**20


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
        passes = _CUT_AND_ADDED + (_MULTIPLIED if op.interleaving else 0)
    return passes * _results_seconds(op, choice, machine)


def cutting_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to cut its share of an array along what devices share.

    Args:
        op: a split, or a slice, of what nothing keeps.
        choice: the factor split over each axis, or `WHOLE`.
        machine: the chips.
    """
    return _SHARED_CUT * _results_seconds(op, choice, machine)


def _shares_width(op: Op, choice: Choice) -> bool:
    """Whether devices share the last dimension of what an op joins."""
    width = op.operands[0].factors[-1]
    return width in choice and width not in op.gathered


def _results_seconds(op: Op, choice: Choice, machine: Machine) -> float:
    """What it takes a device to add up its shares of what an op makes."""
    return sum(shard_seconds(made, layout_of(made, choice), machine) for made in op.results)


class JoinedCopies:
    """The copies of what a step joins; of one that neither trains nor decodes, on a TPU.

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
        split = factors_split(result, layout, op.factor_sizes, sizes)
        if _shares_width(op, split):
            return 0.0
        n_bytes = local_bytes(result.n_bytes, layout, sizes)
        padding = 1.0
        if op.interleaving:
            local = local_sizes(op, split, sizes)
            padding = TILE_ROWS / _rows(op.interleaving, result, local)
        fits = 2 * n_bytes * (1 + padding) < _KERNEL_BYTES
        passes = _COPIED * padding * (1 if fits else 2)
        return max(KERNEL_SECONDS, passes * shard_seconds(result, layout, self._machine))


def _rows(interleaving: Interleaving, result: Array, local: Sequence[int]) -> int:
    """What a device has along the rows of a tile of interleaved halves: at least these two.

    The heads that share a key's where it has several of these, else the heads or the sequences,
    whichever are more.

    Args:
        interleaving: what is interleaved.
        result: sequences and heads, of which one may be missing, tokens, halves and pairs.
        local: what the device has of each factor.
    """
    *dims, _, _ = enumerate(result.factors)
    sizes = [1 if f is None else local[f] for dim, f in dims if dim != interleaving.tokens]
    sharing = min(interleaving.sharing, sizes[-1]) if sizes else 1
    return max(2, tile_rows(sharing if sharing > 1 else max(sizes, default=1)))
