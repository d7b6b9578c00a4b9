"""At which place in its block a layer stands: what corresponds in the blocks of a stack."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from autoshard.graph.equations import FlatJaxpr
from autoshard.model.paths import in_any_block, layer_templates

__all__ = ["with_places"]


def with_places(flat: FlatJaxpr, templates: Mapping[str, str]) -> FlatJaxpr:
    """The step, each equation with the place of its layer.

    Args:
        flat: the step.
        templates: path of each variable or layer output -> its template; what is in none of these
            layers is at a place of its own.
    """
    layers = layer_templates(templates)
    place = cache(lambda layer: in_any_block(layer, layers))
    equations = tuple(replace(one, place=place(one.layer)) for one in flat.equations)
    return replace(flat, equations=equations)
