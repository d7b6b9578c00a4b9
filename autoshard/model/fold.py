"""Rebuilds a model with fewer blocks, found by trying and kept only when proven the same.

No name is assumed: any integer of the configuration that equals the number of blocks may be the
depth, and any list of that length may describe the blocks one by one. A change is kept when the
rebuilt model has exactly the variables of the blocks it keeps, and blocks of the same kinds.
"""

import copy
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from autoshard.errors import ModelError, UsageError
from autoshard.model.blocks import Stack, blocks_like, elsewhere, find_stacks
from autoshard.model.folding import BlockStack, Folding, find_repetition
from autoshard.model.recipe import AbstractModel, build_recipe
from autoshard.model.thinning import counts_of, without_blocks

__all__ = ["PLANNED_PERIODS", "check_periods", "fold"]

PLANNED_PERIODS = 2
"""Of a model that is planned: more price the same, but for the count of what repeats."""

Keys = tuple[str | int, ...]
Rows = Counter[tuple[Any, ...]]


def fold(model: AbstractModel, *, periods: int | None, leaves_out: bool = False) -> AbstractModel:
    """Build a model again with fewer blocks.

    Args:
        model: the whole model.
        periods: how many periods of each stack to keep, at least 1; None for all, so that the
            stacks are found and nothing is left out.
        leaves_out: whether a step may leave blocks out that the model cannot be built without (see
            `autoshard.model.thinning`); its blocks are known to be chains.

    Raises:
        UsageError: fewer than 1.

    Returns:
        The folded model, with `folding` saying what each block stands for; the model itself, with
        its stacks unfolded, where it cannot be rebuilt or has no more periods than that.
    """
    if periods is not None and periods < 1:
        raise UsageError(f"{periods} periods of blocks are no model; give 1 or more")
    whole = find_stacks(model)
    wanted = _wanted(whole, periods)
    folded, stacks = model, {t: replace(s, traced=s.n_blocks) for t, s in wanted.items()}
    config = dict(model.recipe.config or {}) if model.recipe else {}
    for template, stack in wanted.items():
        if stacks[template].traced == stack.traced:
            continue
        for changed in _changes(config, stack):
            attempt = _attempt(model, whole, wanted, changed)
            if attempt and attempt[1][template].traced == stack.traced:
                (folded, stacks), config = attempt, changed
                break
    kept = {
        template: stack.stand_ins()
        for template, stack in wanted.items()
        if leaves_out and stack.traced < stacks[template].traced
    }
    counts = {}
    if kept and (thinned := without_blocks(folded, kept)):
        counts = {template: counts_of(each, stacks[template]) for template, each in kept.items()}
        folded, stacks = thinned, wanted
    shared = _shared(whole, model, folded)
    folding = Folding(blocks=tuple(stacks.values()), shared=shared, counts=counts)
    return replace(folded, folding=folding)


def check_periods(model: AbstractModel, periods: int | None) -> None:
    """Make sure that a model can be built with so many periods of its blocks.

    Args:
        model: the whole model.
        periods: as for `fold`.

    Raises:
        UsageError: it has no blocks that repeat, or cannot be built with fewer; or fewer than 1.
    """
    if periods is None:
        return
    stacks = fold(model, periods=periods).folding.blocks
    if not stacks:
        raise UsageError(f"'{model.name}' has no blocks that repeat: ask for the whole model")
    if all(s.traced == s.n_blocks for s in stacks) and any(s.n_periods > periods for s in stacks):
        raise UsageError(
            f"'{model.name}' cannot be built with fewer blocks, as KerasHub's models can from "
            "their configuration: ask for the whole model"
        )


def _shared(
    stacks: Sequence[Stack], whole: AbstractModel, folded: AbstractModel
) -> dict[str, Fraction]:
    """For how many weights each of the folded model stands whose path several blocks share."""
    paths = {path for stack in stacks for block in stack.layers for path in elsewhere(block)}
    real, kept = (Counter(weight.path for weight in m.model.weights) for m in (whole, folded))
    return {path: Fraction(real[path], kept[path]) for path in sorted(paths) if kept[path]}


def _wanted(stacks: Sequence[Stack], periods: int | None) -> dict[str, BlockStack]:
    """How far each stack would be folded.

    Stacks of one depth may hang on one number, so they are folded alike.
    """
    wanted = {}
    for stack in stacks:
        n_blocks = len(stack.kinds)
        alike = zip(*(s.kinds for s in stacks if len(s.kinds) == n_blocks), strict=True)
        numbers: dict[Hashable, int] = {}
        kinds = [numbers.setdefault(kind, len(numbers)) for kind in alike]
        lead, period = find_repetition(kinds)
        whole_stack = BlockStack(
            template=stack.template,
            start=stack.start,
            n_blocks=n_blocks,
            lead=lead,
            period=period,
            traced=n_blocks,
        )
        wanted[stack.template] = whole_stack if periods is None else whole_stack.folded(periods)
    return wanted


def _changes(config: Mapping[str, Any], stack: BlockStack) -> Iterator[dict[str, Any]]:
    """Configurations in which one number, with or without lists of that length, is smaller."""
    found = list(_walk(config))
    depths = [keys for keys, value in found if type(value) is int and value == stack.n_blocks]
    # Only the order of trying: most depths are called so.
    depths.sort(key=lambda keys: "layer" not in str(keys[-1]))
    lists = tuple(
        keys
        for keys, value in found
        if isinstance(value, (list, tuple)) and len(value) == stack.n_blocks
    )
    for depth in depths:
        beside = tuple(keys for keys in lists if keys[:-1] == depth[:-1])
        for together in dict.fromkeys(((), beside, lists, *((keys,) for keys in lists))):
            yield _shortened(config, depth, together, stack)


def _walk(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    yield keys, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, (*keys, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            if isinstance(inner, (Mapping, list, tuple)):
                yield from _walk(inner, (*keys, index))


def _shortened(
    config: Mapping[str, Any], depth: Keys, lists: Sequence[Keys], stack: BlockStack
) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))

    def put(keys: Keys, value: Any) -> None:
        holder: Any = changed
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value

    put(depth, stack.traced)
    real = [stack.real_block(block) for block in range(stack.traced)]
    for keys in lists:
        value: Any = changed
        for key in keys:
            value = value[key]
        put(keys, [value[block] for block in real])
    return changed


def _attempt(
    model: AbstractModel,
    whole: Sequence[Stack],
    wanted: Mapping[str, BlockStack],
    config: Mapping[str, Any],
) -> tuple[AbstractModel, dict[str, BlockStack]] | None:
    """The rebuilt model and its stacks, if it is the same model with blocks left out."""
    assert model.recipe is not None
    try:
        folded = build_recipe(model.recipe, config)
    except ModelError:
        # The number was not the depth: a head count, say, that divides nothing any more.
        return None
    rest = _rows(model.model.weights)
    expected: Rows = Counter()
    stacks = {}
    for stack in whole:
        blocks, kinds = blocks_like(stack, folded)
        target, n_now = wanted[stack.template], len(blocks)
        if n_now not in (target.traced, target.n_blocks):
            return None
        stacks[stack.template] = target = replace(target, traced=n_now)
        real = [target.real_block(block) for block in range(n_now)]
        if kinds != tuple(stack.kinds[block] for block in real):
            return None
        for layer in stack.layers:
            rest.subtract(_rows(layer.weights))
        for block in real:
            expected.update(_rows(stack.layers[block].weights))
    if any(count < 0 for count in rest.values()):
        return None
    expected.update(rest)
    return (folded, stacks) if +expected == _rows(folded.model.weights) else None


def _rows(weights: Sequence[Any]) -> Rows:
    """Weights without the numbers of their path, which differ between the two models."""
    return Counter(
        (re.sub(r"_\d+(?=/|$)", "", w.path), tuple(w.shape), str(w.dtype), w.trainable)
        for w in weights
    )
