"""The stacks of repeated blocks in a Keras model, and of what kind each block is.

The kind is read off the layers: classes, weights, and every plain setting that they hold, so that
a block with a sliding window differs from one without. A number that grows by one from block to
block is the block's index and says nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from autoshard.model.keras_import import import_keras
from autoshard.model.paths import block_pattern, number_of, path_templates
from autoshard.model.recipe import AbstractModel, inner_layers, layers_by_path

__all__ = ["Stack", "blocks_like", "blocks_of", "elsewhere", "find_stacks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Repeated blocks.

    Attributes:
        template: their path, with `*` for the number.
        start: the number of the first.
        layers: the blocks, in order.
        kinds: what tells blocks apart, one a block.
        indices: settings that only count the blocks, left out of the kinds.
    """

    template: str
    start: int
    layers: tuple[Any, ...]
    kinds: tuple[Hashable, ...]
    indices: frozenset[str]


def find_stacks(model: AbstractModel) -> tuple[Stack, ...]:
    """The outermost stacks whose blocks are layers, each weight of which is told to be a block's.

    It is by its path: under that of the block, or under one that all blocks share (SmolLM3 names a
    layer so by mistake). A block of a kind of its own may hold any: it stands for no other (the
    first block of T5 has the positions of all).
    """
    layers = layers_by_path(model.model)
    templates = path_templates([f"{path}/output" for path in layers])
    members: dict[str, dict[int, Any]] = defaultdict(dict)
    for path, layer in layers.items():
        template = templates[f"{path}/output"].removesuffix("/output")
        if template.endswith("_*") and template.count("*") == 1:
            members[template][number_of(path)] = layer
    stacks = []
    for template, blocks in members.items():
        start = min(blocks)
        in_order = tuple(blocks[number] for number in sorted(blocks))
        if max(blocks) - start + 1 != len(blocks):
            continue
        facts = [dict(_facts(block, "")) for block in in_order]
        indices = frozenset(k for k in facts[0] if _counts_up([f.get(k) for f in facts]))
        kinds = tuple(_kind(fact, indices) for fact in facts)
        alike = Counter(kinds)
        repeated = [b for b, kind in zip(in_order, kinds, strict=True) if alike[kind] > 1]
        if len(set(map(elsewhere, repeated))) <= 1:
            stacks.append(
                Stack(template=template, start=start, layers=in_order, kinds=kinds, indices=indices)
            )
    return tuple(stacks)


def blocks_like(stack: Stack, model: AbstractModel) -> tuple[tuple[Any, ...], tuple[Hashable, ...]]:
    """The blocks that another model has in this stack's place, perhaps a single one, and kinds."""
    blocks = _numbered(stack.template, model)
    return blocks, tuple(_kind(dict(_facts(block, "")), stack.indices) for block in blocks)


def blocks_of(model: AbstractModel) -> tuple[tuple[Any, ...], ...]:
    """The blocks of each stack, in order; of a stack that was folded there may be one."""
    if not model.folding.blocks:
        return tuple(stack.layers for stack in find_stacks(model))
    return tuple(_numbered(stack.template, model) for stack in model.folding.blocks)


def _numbered(template: str, model: AbstractModel) -> tuple[Any, ...]:
    """The layers of a model whose path is that of a block, in order."""
    pattern = re.compile(block_pattern(template))
    layers = layers_by_path(model.model).items()
    blocks = {number_of(path): layer for path, layer in layers if pattern.fullmatch(path)}
    return tuple(blocks[number] for number in sorted(blocks))


def _kind(facts: dict[str, Hashable], indices: frozenset[str]) -> Hashable:
    return tuple(item for item in facts.items() if item[0] not in indices)


def elsewhere(block: Any) -> frozenset[str]:
    """The paths of a block's weights that are not under its own."""
    paths = {weight.path for weight in block.weights}
    return frozenset(path for path in paths if not path.startswith(f"{block.path}/"))


def _counts_up(values: list[Any]) -> bool:
    if any(type(value) is not int for value in values):
        return False
    return values == list(range(values[0], values[0] + len(values)))


def _facts(layer: Any, prefix: str) -> Iterator[tuple[str, Hashable]]:
    yield f"{prefix}class", type(layer).__name__
    yield f"{prefix}dtype", layer.dtype_policy.name
    for weight in layer._trainable_variables + layer._non_trainable_variables:
        yield f"{prefix}{weight.name}", (tuple(weight.shape), str(weight.dtype), weight.trainable)
    for key, value in sorted(vars(layer).items()):
        if key not in _bookkeeping() and "seed" not in key:
            plain, is_plain = _plain(value)
            if is_plain:
                yield f"{prefix}{key}", plain
    for position, inner in enumerate(inner_layers(layer)):
        yield from _facts(inner, f"{prefix}{position}/")


@cache
def _bookkeeping() -> frozenset[str]:
    """What every layer has: names, paths and nodes, which differ and compute nothing."""
    keras = import_keras()
    return frozenset(vars(keras.layers.Layer(name="any")))


def _plain(value: Any) -> tuple[Hashable, bool]:
    """A setting as far as it changes what is computed on which shapes."""
    if value is None or isinstance(value, (bool, int, str)):
        return value, True
    if isinstance(value, float):
        # Rates and scales may differ from block to block; only whether they act changes the step.
        return ("float", value != 0), True
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return tuple(part for part, _ in parts), all(is_plain for _, is_plain in parts)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__, True
    return None, False
