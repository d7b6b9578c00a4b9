"""The rules of lookups and of their gradients."""

from collections.abc import Sequence
from typing import Any

from autoshard.graph.link import Label, Link, Shape, drop_ones

__all__ = ["gather_rule", "scatter_rule"]


def gather_rule(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """A lookup: result dimensions come from the indices or from whole slices of the operand.

    An operand dimension that is looked up one entry at a time is reduced: each device looks up
    what it holds, zeros elsewhere, and the results are summed.
    """
    numbers = params["dimension_numbers"]
    operand, indices = operands
    looked_up = set(numbers.collapsed_slice_dims)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    offsets = iter(numbers.offset_dims)
    source: list[Label | None] = [None] * len(operand)
    result: list[Label | None] = [None] * len(results[0])
    for dim, size in enumerate(operand):
        if dim in looked_up:
            source[dim] = ("looked up", dim)
        elif dim not in batching:
            target = next(offsets)
            if params["slice_sizes"][dim] == size:
                source[dim] = result[target] = ("slice", dim)
    where: list[Label | None] = [None] * len(indices)
    rest = [dim for dim in range(len(results[0])) if dim not in numbers.offset_dims]
    for i, dim in enumerate(rest):
        where[i] = result[dim] = ("index", i)
    for dim, at in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        source[dim] = where[at]
    reduced = frozenset(("looked up", dim) for dim in looked_up if operand[dim] > 1)
    return Link(
        kind="gather",
        operands=(drop_ones(source, operand), drop_ones(where, indices)),
        results=(drop_ones(result, results[0]),),
        reduced=reduced,
    )


def scatter_rule(operands: Sequence[Shape], results: Sequence[Shape], params: Any) -> Link:
    """The gradient of a lookup: updates are added into the rows that the indices name.

    Rows of the result split freely (each device adds what falls into its rows); the dimensions of
    the updates that the indices run over are reduced.
    """
    numbers = params["dimension_numbers"]
    operand, indices, updates = operands
    inserted = set(numbers.inserted_window_dims)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = iter(numbers.update_window_dims)
    target: list[Label | None] = [None] * len(operand)
    update: list[Label | None] = [None] * len(updates)
    for dim, size in enumerate(operand):
        if dim in inserted:
            target[dim] = ("row", dim)
        elif dim not in batching:
            window = next(windows)
            if updates[window] == size:
                target[dim] = update[window] = ("slice", dim)
    where: list[Label | None] = [None] * len(indices)
    rest = [dim for dim in range(len(updates)) if dim not in numbers.update_window_dims]
    for i, dim in enumerate(rest):
        where[i] = update[dim] = ("index", i)
    at_dims = getattr(numbers, "scatter_indices_batching_dims", ())
    for dim, at in zip(batching, at_dims, strict=True):
        target[dim] = where[at]
    summed = {("index", i) for i, dim in enumerate(rest) if updates[dim] > 1} - set(target)
    labels = drop_ones(target, operand)
    return Link(
        kind="scatter",
        operands=(labels, drop_ones(where, indices), drop_ones(update, updates)),
        results=(labels,),
        reduced=frozenset(summed),
    )
