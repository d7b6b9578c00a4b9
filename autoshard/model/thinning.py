"""Leaves blocks out of a model where no configuration can: those between two like them.

Of blocks in a row that are equal, or periods of blocks that are, the first and the last are called;
those between hand on what they are given and own no weights. So a step is traced at a few blocks'
cost whose model cannot be built any smaller (a table of Gemma 4 has columns for each block, a
callable returns what it returns) or repeats itself within a period, as Gemma 3 with five local
blocks before a global one.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.blocks import Stack, find_stacks
from autoshard.model.folding import BlockStack
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel, build_recipe, layers_by_path

__all__ = ["thin", "thinned_counts", "without_blocks"]

# Of two the first stands for all others: fewer alike cannot be made less.
_LEAST_ALIKE = 3


def thin(model: AbstractModel) -> AbstractModel:
    """Build a model again of which a step calls fewer blocks.

    That a block is one of a chain, and not beside the others, is for the caller to see in the step.

    Args:
        model: folded as far as it goes.

    Returns:
        The copy, with `folding` saying for how many blocks each stands: 0 for those left out. The
        model itself where none can be.
    """
    counts = _counts(model)
    copy = without_blocks(model, counts) if counts else None
    if copy is None:
        return model
    folding = replace(model.folding, shared=_shared(model, copy), counts=counts)
    return replace(copy, folding=folding)


def without_blocks(
    model: AbstractModel, counts: Mapping[str, Sequence[int]]
) -> AbstractModel | None:
    """Build a model again of which a step leaves blocks out; None where that is not possible.

    Args:
        model: what is built again.
        counts: template of a stack -> for how many blocks each stands: 0 for those to leave out.

    Returns:
        The copy, with no `folding`.
    """
    try:
        copy = build_recipe(model.recipe) if model.recipe else model
    except ModelError:
        return None
    before, after = layers_by_path(model.model), layers_by_path(copy.model)
    if before.keys() != after.keys() or any(before[path] is after[path] for path in before):
        return None  # a callable may return one model again and again
    for found in find_stacks(copy):
        if found.template in counts:
            _leave_out(found, counts[found.template])
    return replace(copy, dtype=model.dtype)


def _counts(model: AbstractModel) -> dict[str, tuple[int, ...]]:
    """Template of each stack of which some blocks can be left out -> `thinned_counts`."""
    stacks = {stack.template: stack for stack in model.folding.blocks}
    counts = {
        found.template: thinned_counts(found.kinds, stacks[found.template])
        for found in find_stacks(model)
        if found.template in stacks and len(found.kinds) == stacks[found.template].traced
    }
    return {template: each for template, each in counts.items() if 0 in each}


def _shared(model: AbstractModel, copy: AbstractModel) -> dict[str, Fraction]:
    """For how many weights those stand whose path several blocks share."""
    n_before, n_left = (Counter(w.path for w in each.model.weights) for each in (model, copy))
    shared = model.folding.shared.items()
    return {path: times * n_before[path] / n_left[path] for path, times in shared}


def thinned_counts(kinds: Sequence[Hashable], stack: BlockStack) -> tuple[int, ...]:
    """For how many blocks of the whole model each block of a stack stands.

    Args:
        kinds: what tells the blocks apart, one a block.
        stack: the stack, as far as it is folded.

    Returns:
        One a block; 0 for those that are left out.

    >>> thinned_counts("llllgllllgllllgll", BlockStack(template="block_*", n_blocks=17, traced=17))
    (6, 0, 0, 2, 2, 0, 0, 0, 0, 0, 3, 0, 0, 1, 1, 1, 1)
    """
    counts = [stack.multiplicity(block) for block in range(len(kinds))]
    looks = zip(kinds, counts, strict=True)
    rows = [_Row(look, {block: look[1]}) for block, look in enumerate(looks)]
    period = 1
    while period <= len(rows) // _LEAST_ALIKE:
        joined = _joined(rows, period)
        period = 1 if len(joined) < len(rows) else period + 1
        rows = joined
    kept = {block: count for row in rows for block, count in row.counts.items()}
    return tuple(kept.get(block, 0) for block in range(len(kinds)))


@dataclass(frozen=True, slots=True)
class _Row:
    """Blocks in a row: how they look, and for how many each that is kept stands."""

    look: Hashable
    counts: Mapping[int, int]


def _joined(rows: Sequence[_Row], period: int) -> list[_Row]:
    """Make one row of each that repeats itself often enough, period after period."""
    joined: list[_Row] = []
    start = 0
    while start < len(rows):
        looks = tuple(row.look for row in rows[start : start + period])
        end = start + period
        while tuple(row.look for row in rows[end : end + period]) == looks:
            end += period
        times = (end - start) // period
        if times < _LEAST_ALIKE:
            joined.append(rows[start])
            start += 1
            continue
        counts = {
            block: count * n_alike
            for first, n_alike in ((start, times - 1), (end - period, 1))
            for row in rows[first : first + period]
            for block, count in row.counts.items()
        }
        joined.append(_Row((looks, times), counts))
        start = end
    return joined


def _leave_out(stack: Stack, counts: Sequence[int]) -> None:
    """Let the blocks that stand for none hand on what they are given, and own nothing."""
    memory = SimpleNamespace()
    for block, count in zip(stack.layers, counts, strict=True):
        kind = type(block)
        call = _remembering(kind.__call__, memory) if count else _handing_on(memory)
        # Python looks a call up in the class.
        block.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        if not count:
            for inside in ("_layers", "_trainable_variables", "_non_trainable_variables"):
                vars(block)[inside] = []


def _remembering(call: Callable[..., Any], memory: SimpleNamespace) -> Callable[..., Any]:
    """The call of a block, which keeps what it returned."""

    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.returned = call(self, *args, **kwargs)
        return memory.returned

    return remembering


def _handing_on(memory: SimpleNamespace) -> Callable[..., Any]:
    """The call of a block that is left out.

    What runs through the chain comes first among what a block takes and what it returns; all else
    that it returns, such as a cache, is that of the last block that was called.
    """

    def handing_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        flatten = import_keras().tree.flatten
        stream, (like, *rest) = flatten((args, kwargs))[0], flatten(memory.returned)
        if (stream.shape, stream.dtype) != (like.shape, like.dtype):
            raise ModelError(f"'{self.path}' does not return what it is given, made anew")
        return import_keras().tree.pack_sequence_as(memory.returned, [stream, *rest])

    return handing_on
