"""The same model with values, drawn or stored, under whatever distribution is set."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoshard.errors import AutoshardError, ModelError
from autoshard.model.abstract import fresh_names
from autoshard.model.keras_import import import_keras, import_keras_hub
from autoshard.model.loading import sharded_loading
from autoshard.model.recipe import AbstractModel, Recipe, assemble, cannot_build

__all__ = ["stores_values", "with_stored_values", "with_values"]

_WEIGHT_FILES = ("model.weights.h5", "model.weights.json")


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
    if model.recipe is None:
        raise ModelError(f"'{model.name}' cannot be built again: pass the name of a model")
    return _built(model, model.recipe, seed)


def stores_values(name: str) -> bool:
    """Whether a model's name is that of a preset directory with weights."""
    return any(Path(name, file).is_file() for file in _WEIGHT_FILES)


def with_stored_values(model: AbstractModel, seed: int) -> AbstractModel:
    """Build a model from its preset directory, with the weights stored there, shard by shard.

    Args:
        model: without values, named by the directory.
        seed: of what is not stored: low-rank factors.

    Returns:
        As `with_values`.

    Raises:
        ModelError: Keras cannot load it.
    """
    dtype = model.backbone.dtype_policy

    def load(config: dict[str, Any]) -> Any:
        with sharded_loading():
            return import_keras_hub().models.Backbone.from_preset(model.name, dtype=dtype)

    rank = model.recipe.lora_rank if model.recipe else None
    recipe = Recipe(name=model.name, make=load, config=None, lora_rank=rank)
    return _built(model, recipe, seed)


def _built(model: AbstractModel, recipe: Recipe, seed: int) -> AbstractModel:
    keras = import_keras()
    config = copy.deepcopy(dict(recipe.config or {}))
    try:
        with fresh_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keras.utils.set_random_seed(seed)
            backbone, task = assemble(recipe, config)
    except AutoshardError:
        raise
    except Exception as error:
        raise cannot_build(recipe.name, error) from error
    return replace(model, backbone=backbone, model=task)
