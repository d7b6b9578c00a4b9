"""`build`: a model by name, or a Keras model, as the planner takes it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autoshard.errors import ModelError, UsageError
from autoshard.model.abstract import abstract_scope
from autoshard.model.keras_import import import_keras, import_keras_hub, without_tensorflow
from autoshard.model.recipe import (
    AbstractModel,
    Recipe,
    build_recipe,
    check_own_rank,
    is_task,
    layers_by_path,
    own_lora_rank,
    with_task,
    wrap,
)
from autoshard.model.references import recipe_of
from autoshard.model.workload import DEFAULT_DTYPE, QUANTIZED, Workload, check_dtype

__all__ = ["build", "build_for"]


def build(
    reference: "str | Callable[[], Any] | Any",
    *,
    dtype: str | None = None,
    lora_rank: int | None = None,
) -> AbstractModel:
    """Build a model without values.

    Args:
        reference: a preset's name, `package.module:callable`, a preset directory, a `.keras` or
            `config.json` file, a `kaggle://` or `hf://` handle; or a Keras model, or a callable
            that returns one.
        dtype: Keras dtype policy; `int8` stores the weights that Keras can quantize in eight bits
            and computes all else in bfloat16. None for the policy that a model, what a callable
            returns, or a file has; bfloat16 for presets.
        lora_rank: give the backbone low-rank factors of this rank and freeze the rest.

    Raises:
        UnknownNameError: there is no model, or no dtype policy, of that name.
        UsageError: the callable cannot be imported, or the model takes no low-rank factors, or has
            another dtype policy than `dtype`, or factors of another rank than `lora_rank`.
        ModelError: Keras cannot build the model without values.
    """
    check_dtype(dtype)
    keras = import_keras()
    if isinstance(reference, keras.layers.Layer) and not isinstance(reference, keras.Model):
        raise UsageError(f"'{reference.name}' is a layer; give a keras.Model with it")
    if isinstance(reference, keras.Model):
        model = _with_own_dtype(_given(reference, lora_rank), dtype)
    elif dtype == QUANTIZED:
        model = _quantized(reference, lora_rank)
    else:
        recipe = recipe_of(reference, dtype, lora_rank)
        model = _rebuildable(build_recipe(recipe))
        if recipe.has_dtype:
            model = _with_own_dtype(model, dtype)
    return model


def build_for(reference: Any, workload: Workload) -> AbstractModel:
    """As `build`, with the dtype and the low-rank factors of a step.

    Args:
        reference: as for `build`.
        workload: the step.
    """
    return build(reference, dtype=workload.dtype, lora_rank=workload.lora_rank)


def _quantized(reference: Any, lora_rank: int | None) -> AbstractModel:
    """The model with a dtype policy of its own for each layer that Keras can quantize.

    `Model.quantize` would compute the eight bits for real; a policy makes the variables at once.
    """
    model = build(reference)
    if model.dtype == QUANTIZED:
        return build(reference, lora_rank=lora_rank)
    keras, recipe = import_keras(), model.recipe
    if recipe is None or recipe.config is None:
        raise UsageError(f"{QUANTIZED} needs a KerasHub backbone, which '{model.name}' is not")
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=DEFAULT_DTYPE)
    layers = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding)
    for path, layer in layers_by_path(model.backbone).items():
        if isinstance(layer, layers):
            policies[path] = keras.dtype_policies.get(f"{QUANTIZED}_from_{DEFAULT_DTYPE}")
    with without_tensorflow():
        dtype = keras.saving.serialize_keras_object(policies)
    config = {**recipe.config, "dtype": dtype}
    return _rebuildable(build_recipe(replace(recipe, config=config, lora_rank=lora_rank)))


def _given(model: Any, lora_rank: int | None) -> AbstractModel:
    """A model that the caller made: its own variables, and a recipe if a copy equals it."""
    backbone = model.backbone if is_task(model) else model
    rank = check_own_rank(model.name, model, lora_rank)
    with abstract_scope():
        task = with_task(backbone) if model is backbone else model
    given = wrap(model.name, backbone, task, None)
    recipe = _recipe_from(given, lora_rank or rank)
    if lora_rank in (None, rank):
        return _with_recipe(given, recipe)
    if recipe is None:
        raise UsageError(f"'{model.name}' takes no low-rank factors: it is no KerasHub backbone")
    return build_recipe(recipe)


def _with_recipe(model: AbstractModel, recipe: Recipe | None) -> AbstractModel:
    """The model with another recipe, where that makes the same variables and trains the same.

    It does not where an author froze layers, which no configuration tells.
    """
    if recipe is None:
        return model
    try:
        twin = build_recipe(recipe)
    except ModelError:
        return model
    flags = [[weight.trainable for weight in one.model.weights] for one in (twin, model)]
    same = twin.table().fingerprint == model.table().fingerprint and flags[0] == flags[1]
    return replace(model, recipe=recipe) if same else model


def _with_own_dtype(model: AbstractModel, asked: str | None) -> AbstractModel:
    """With the dtype policy that it is made with."""
    name = _own_dtype(model)
    if not name:
        return model
    if asked not in (None, name):
        raise UsageError(
            f"'{model.name}' is made with dtype {name}, and {asked} is asked for; leave the dtype "
            f"out, or make the model with {asked}"
        )
    return replace(model, dtype=name)


def _own_dtype(model: AbstractModel) -> str:
    """The dtype policy of most parameters, "" where there are none."""
    sizes: Counter[str] = Counter()
    for path, layer in layers_by_path(model.model).items():
        policy = layer.dtype_policy
        name = policy[path].name if isinstance(policy, Mapping) else policy.name
        name = QUANTIZED if name.startswith(QUANTIZED) else name
        own = (*layer._trainable_variables, *layer._non_trainable_variables)
        sizes[name] += sum(math.prod(variable.shape) for variable in own)
    name = max(sizes, key=sizes.__getitem__, default="")
    return name if sizes[name] else ""


def _rebuildable(model: AbstractModel) -> AbstractModel:
    """The same model with a recipe whose configuration can be changed, where its class has one."""
    recipe = model.recipe
    if recipe is None or (recipe.config is not None and "class_name" not in recipe.config):
        return model
    rank = recipe.lora_rank or own_lora_rank(model.backbone)
    return _with_recipe(model, _recipe_from(model, rank))


def _recipe_from(model: AbstractModel, lora_rank: int | None) -> Recipe | None:
    if not isinstance(model.backbone, import_keras_hub().models.Backbone):
        return None
    with without_tensorflow():
        config = _plain(model.backbone.get_config())
    return Recipe(
        name=model.name,
        make=type(model.backbone).from_config,
        config=config,
        task_class=type(model.model) if model.model is not model.backbone else None,
        lora_rank=lora_rank,
    )


def _plain(config: Any) -> Any:
    """A configuration without Keras' tracked lists and dicts: a copy of those copies the model."""
    if isinstance(config, dict):
        return {key: _plain(value) for key, value in config.items()}
    return [_plain(value) for value in config] if isinstance(config, list) else config
