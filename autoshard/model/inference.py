"""The steps that do not train: a forward pass with logits, and one token against a cache."""

from collections.abc import Sequence
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.abstract import recording_scope
from autoshard.model.inputs import model_inputs, output_structure
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel, one_line
from autoshard.model.signature import (
    Arrays,
    Step,
    StepArgument,
    StepResult,
    data_argument,
    training_mode,
    variable_arguments,
)
from autoshard.model.workload import Workload

__all__ = ["decode_step", "prefill_step"]


def prefill_step(model: AbstractModel, workload: Workload) -> Step:
    """One batch of `predict`: the outputs."""
    keras = import_keras()
    inputs, structure = model_inputs(model.model, workload)
    variables, n_trainable = variable_arguments(model.model)
    names = [path for path, _ in keras.tree.flatten_with_path(output_structure(model.model))]

    def prefill(*arrays: Any) -> Arrays:
        outputs, _ = model.model.stateless_call(
            arrays[:n_trainable],
            arrays[n_trainable : len(variables)],
            keras.tree.pack_sequence_as(structure, arrays[len(variables) :]),
            **training_mode(model.model, False),
        )
        return tuple(keras.tree.flatten(outputs))

    return Step(
        function=prefill,
        arguments=(*variables, *map(data_argument, inputs)),
        results=tuple(
            StepResult(
                role="logits" if model.generates else "output", path="/".join(map(str, name))
            )
            for name in names
        ),
        task=model.task,
        loss=None,
    )


def decode_step(model: AbstractModel, workload: Workload) -> Step:
    """One turn of the loop in `generate`: the next token's logits, and the cache with it added.

    The model's own `generate_step` runs, with the pass that fills the cache replaced by the cache
    as an argument, and the sampler replaced by one call of its `next`.

    Raises:
        ModelError: the model has no cache.
    """
    keras = import_keras()
    if not (model.generates and hasattr(model.model, "_build_cache")):
        raise ModelError(
            f"{model.task} has no cache to decode with, as a KerasHub CausalLM has: take another "
            "workload"
        )
    prompt, structure = model_inputs(model.model, workload)
    variables, _ = variable_arguments(model.model)
    filled, carried = _cache_shapes(
        model.model, variables, tuple(map(data_argument, prompt)), structure
    )
    # Pictures are read once, with the prompt.
    inputs, _ = model_inputs(model.model, workload, pictures=False)
    leaves = keras.tree.flatten(filled[1:])
    cache = tuple(
        StepArgument(
            role="cache", path=f"cache/{i}", shape=tuple(leaf.shape), dtype=str(leaf.dtype)
        )
        for i, leaf in enumerate(leaves)
    )
    ends = (len(variables), len(variables) + len(cache))

    def decode(*arrays: Any) -> Arrays:
        def fill(*args: Any, **kwargs: Any) -> Any:
            # The prompt's hidden states come first, and no `next` reads them.
            hidden = keras.tree.map_structure(
                lambda a: keras.ops.zeros(a.shape, a.dtype), filled[0]
            )
            return (hidden, *keras.tree.pack_sequence_as(filled[1:], arrays[ends[0] : ends[1]]))

        def sample(next: Any, prompt: Any, cache: Any, index: Any, **_: Any) -> Any:
            turns.append(next(prompt, cache, index))
            return prompt

        turns: list[Any] = []
        data = keras.tree.pack_sequence_as(structure, arrays[ends[1] :])
        _generate(model.model, arrays[: ends[0]], data, fill, sample)
        logits, _, new_cache = turns[0]
        leaves = zip(carried, keras.tree.flatten(new_cache), strict=True)
        return (logits, *(leaf for i, leaf in leaves if i is not None))

    return Step(
        function=decode,
        arguments=(*variables, *cache, *map(data_argument, inputs)),
        results=(
            StepResult(role="logits", path=""),
            *(
                StepResult(role="cache", path=cache[i].path, argument=ends[0] + i)
                for i in carried
                if i is not None
            ),
        ),
        task=model.task,
        loss=None,
    )


def _cache_shapes(
    model: Any, variables: Sequence[StepArgument], data: Sequence[StepArgument], structure: Any
) -> tuple[Any, tuple[int | None, ...]]:
    """The shapes that `_build_cache` returns, and which of those arrays `next` carries on.

    Beside them it may carry inputs, as the mask of an encoder: None.
    """
    import jax

    keras = import_keras()
    carried: list[int | None] = []

    def prompt_pass(*arrays: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Any:
            results.append(build_cache(*args, **kwargs))
            return results[0]

        def sample(next: Any, prompt: Any, cache: Any, index: Any, **_: Any) -> Any:
            place = {id(leaf): i for i, leaf in enumerate(keras.tree.flatten(results[0][1:]))}
            carried.extend(place.get(id(leaf)) for leaf in keras.tree.flatten(cache))
            return prompt

        results: list[Any] = []
        build_cache = model._build_cache
        inputs = keras.tree.pack_sequence_as(structure, arrays[len(variables) :])
        _generate(model, arrays[: len(variables)], inputs, fill, sample)
        return results[0]

    shapes = [jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype)) for a in (*variables, *data)]
    with recording_scope():
        try:
            return jax.eval_shape(prompt_pass, *shapes), tuple(carried)
        except Exception as error:
            raise ModelError(
                f"the cache of {type(model).__name__} cannot be traced: {one_line(error)}"
            ) from error


def _generate(model: Any, arrays: Arrays, data: Any, fill: Any, sample: Any) -> None:
    """Run `generate_step` on these values of the variables, with another cache and sampler."""
    keras = import_keras()
    variables = (*model.trainable_variables, *model.non_trainable_variables)
    sampler = model.sampler
    # On the instance: the class, and other models of it, keep their own.
    model._build_cache, model.sampler = fill, sample
    try:
        with keras.StatelessScope(state_mapping=zip(variables, arrays, strict=True)):
            model.generate_step(data, stop_token_ids=None)
    finally:
        model.sampler = sampler
        del model._build_cache
