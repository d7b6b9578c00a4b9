"""Leaves blocks out of a model where no configuration can: those between two like them.

Of blocks in a row that are equal, or periods of blocks that are, the first and the last are called;
those between hand on what they are given and own no weights. So a step is traced at a few blocks'
cost whose model cannot be built any smaller (a table of Gemma 4 has columns for each block, a
callable returns what it returns) or repeats itself within a period, as Gemma 3 with five local
blocks before a global one.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.blocks import Stack, find_stacks
from autoshard.model.folding import BlockStack
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel, build_recipe, layers_by_path

__all__ = ["StandIns", "called_alike", "counts_of", "stand_ins", "thin", "without_blocks"]

# A block that is called -> the blocks that it stands for, itself among them, by number from 0.
StandIns = Mapping[int, tuple[int, ...]]

# Of two the first stands for all others: fewer alike cannot be made less.
_LEAST_ALIKE = 3


def thin(model: AbstractModel) -> AbstractModel:
    """Build a model again of which a step calls fewer blocks.

    That the blocks are chains, and called alike, is for the caller to see in the step: see
    `autoshard.graph.chains` and `called_alike`.

    Args:
        model: folded as far as it goes.

    Returns:
        The copy, with `folding` saying for how many blocks each stands: 0 for those left out. The
        model itself where none can be.
    """
    stacks = {stack.template: stack for stack in model.folding.blocks}
    kept = _stand_ins(model, stacks)
    copy = without_blocks(model, kept) if kept else None
    if copy is None:
        return model
    counts = {template: counts_of(each, stacks[template]) for template, each in kept.items()}
    folding = replace(model.folding, shared=_shared(model, copy), counts=counts)
    return replace(copy, folding=folding)


def without_blocks(model: AbstractModel, kept: Mapping[str, StandIns]) -> AbstractModel | None:
    """Build a model again of which a step leaves blocks out; None where that is not possible.

    Args:
        model: what is built again.
        kept: template of a stack -> its blocks that are called.

    Returns:
        The copy, with no `folding`.
    """
    if model.recipe is None:
        return None
    try:
        copy = build_recipe(model.recipe)
        before, after = layers_by_path(model.model), layers_by_path(copy.model)
        if before.keys() != after.keys() or any(before[path] is after[path] for path in before):
            return None  # a callable may return one model again and again
        for found in find_stacks(copy):
            if found.template in kept:
                _leave_out(found, kept[found.template])
    except (ModelError, TypeError):  # a class may refuse to be derived from
        return None
    return replace(copy, dtype=model.dtype)


def _stand_ins(
    model: AbstractModel, stacks: Mapping[str, BlockStack]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Template of each stack of which some blocks can be left out -> those that are called.

    A setting that counts the blocks may mean more than a place: then none is left out.
    """
    kept = {}
    for found in find_stacks(model):
        stack = stacks.get(found.template)
        if stack is None or found.indices or len(found.kinds) != stack.traced:
            continue
        looks = [(kind, stack.multiplicity(block)) for block, kind in enumerate(found.kinds)]
        each = stand_ins(looks, first_apart=_is_first_trained(found.layers[0], model))
        if len(each) < len(looks):
            kept[found.template] = each
    return kept


def _is_first_trained(block: Any, model: AbstractModel) -> bool:
    """Whether nothing is trained that lies before a block: then it has no gradient to hand on."""
    own = {id(weight) for weight in block.weights}
    for weight in model.model.weights:
        if id(weight) in own:
            return True
        if weight.trainable:
            return False
    return True


def _shared(model: AbstractModel, copy: AbstractModel) -> dict[str, Fraction]:
    """For how many weights those stand whose path several blocks share."""
    n_before, n_left = (Counter(w.path for w in each.model.weights) for each in (model, copy))
    shared = model.folding.shared.items()
    return {path: times * n_before[path] / n_left[path] for path, times in shared}


def counts_of(kept: StandIns, stack: BlockStack) -> tuple[int, ...]:
    """For how many blocks of the whole model each block of a stack stands: 0 for those left out.

    Args:
        kept: the blocks that are called.
        stack: the stack, as far as it is folded.
    """
    return tuple(
        sum(stack.multiplicity(other) for other in kept.get(block, ()))
        for block in range(stack.traced)
    )


def stand_ins(
    looks: Sequence[Hashable], *, first_apart: bool = False
) -> dict[int, tuple[int, ...]]:
    """The blocks of a stack to call, each with those that it stands for.

    Args:
        looks: what tells the blocks apart, one a block.
        first_apart: whether the first block stands for no other.

    >>> stand_ins("llllgllll")
    {0: (0, 1, 2), 3: (3,), 4: (4,), 5: (5, 6, 7), 8: (8,)}
    """
    rows = [_Row((look, first_apart and not i), {i: (i,)}) for i, look in enumerate(looks)]
    period = 1
    while period <= len(rows) // _LEAST_ALIKE:
        joined = _joined(rows, period)
        period = 1 if len(joined) < len(rows) else period + 1
        rows = joined
    return {block: stood_for for row in rows for block, stood_for in row.kept.items()}


@dataclass(frozen=True, slots=True)
class _Row:
    """Blocks in a row: how they look, and which are kept."""

    look: Hashable
    kept: StandIns


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
        *first, last = (
            [item for row in rows[at : at + period] for item in row.kept.items()]
            for at in range(start, end, period)
        )
        alike = zip(*first, strict=True)
        kept = {same[0][0]: tuple(b for _, stood in same for b in stood) for same in alike}
        joined.append(_Row((looks, times), {**kept, **dict(last)}))
        start = end
    return joined


@dataclass(slots=True)
class _Chain:
    """What the blocks of a stack were given, call by call, and what the last one returned."""

    kept: StandIns
    calls: dict[int, list[Hashable]] = field(default_factory=dict)
    returned: Any = None

    def agrees(self) -> bool:
        """Whether each block that is left out was called as the one that stands for it."""
        return all(
            self.calls.get(other) == self.calls.get(block)
            for block, stood_for in self.kept.items()
            for other in stood_for
        )


def called_alike(model: AbstractModel) -> bool:
    """Whether the blocks left out were called as those that stand for them, when it was traced.

    As often, and with arrays of the same shapes: a block in which the sequence is halved, or that
    attends to something else, is not.
    """
    layers = layers_by_path(model.model).values()
    chains = (getattr(type(layer), "_chain", None) for layer in layers)
    return all(chain.agrees() for chain in chains if isinstance(chain, _Chain))


def _leave_out(stack: Stack, kept: StandIns) -> None:
    """Let the blocks that are not kept hand on what they are given, and own nothing."""
    chain = _Chain(kept)
    for number, block in enumerate(stack.layers):
        kind = type(block)
        call = _remembering(kind.__call__, chain) if number in kept else _handing_on(chain)
        # Python looks a call up in the class.
        members = {"__call__": _noting(call, chain, number), "_chain": chain}
        members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        block.__class__ = type(kind.__name__, (kind,), members)
        if number not in kept:
            for inside in ("_layers", "_trainable_variables", "_non_trainable_variables"):
                vars(block)[inside] = []


def _noting(call: Callable[..., Any], chain: _Chain, number: int) -> Callable[..., Any]:
    """A call of which is noted what it was given."""

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = map(_noted, import_keras().tree.flatten((args, kwargs)))
        chain.calls.setdefault(number, []).append((len(args), tuple(sorted(kwargs)), *given))
        return call(self, *args, **kwargs)

    return noting


def _noted(given: Any) -> Hashable:
    """What of an argument decides on the work: not the value of a number, as a block's place is."""
    if hasattr(given, "shape"):
        return tuple(given.shape), str(given.dtype)
    return given if given is None or isinstance(given, (bool, str)) else type(given).__name__


def _remembering(call: Callable[..., Any], chain: _Chain) -> Callable[..., Any]:
    """The call of a block, which keeps what it returned."""

    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        chain.returned = call(self, *args, **kwargs)
        return chain.returned

    return remembering


def _handing_on(chain: _Chain) -> Callable[..., Any]:
    """The call of a block that is left out, which is taken to return what it is given, made anew.

    What runs through the chain comes first among what a block takes and what it returns; all else
    that it returns, such as a cache, is that of the last block that was called.
    """

    def handing_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        flatten = import_keras().tree.flatten
        stream, (like, *rest) = flatten((args, kwargs))[0], flatten(chain.returned)
        if (stream.shape, stream.dtype) != (like.shape, like.dtype):
            raise ModelError(f"'{self.path}' does not return what it is given, made anew")
        return import_keras().tree.pack_sequence_as(chain.returned, [stream, *rest])

    return handing_on
