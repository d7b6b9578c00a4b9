"""The same model with values: built for real, under whatever distribution is set."""

import copy
import warnings
from dataclasses import replace
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.abstract import fresh_names
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel, assemble, one_line

__all__ = ["with_values"]


def with_values(model: AbstractModel, seed: int) -> AbstractModel:
    """Build a model again, with the values that its own initializers draw.

    JAX draws the same numbers however an array is laid out: two builds from one seed hold the same
    weights, sharded or not.

    Args:
        model: without values; perhaps folded.
        seed: of every random number, through `keras.utils.set_random_seed`.

    Returns:
        The same description around Keras objects whose variables hold arrays.

    Raises:
        ModelError: there is no recipe, or Keras cannot build it.
    """
    recipe = model.recipe
    if recipe is None:
        raise ModelError(f"'{model.name}' cannot be built again: pass the name of a model")
    keras = import_keras()
    config: dict[str, Any] = copy.deepcopy(dict(recipe.config or {}))
    try:
        with fresh_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keras.utils.set_random_seed(seed)
            backbone, task = assemble(recipe, config)
    except Exception as error:
        raise ModelError(f"Keras cannot build '{recipe.name}': {one_line(error)}") from error
    return replace(model, backbone=backbone, model=task)
