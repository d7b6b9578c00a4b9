"""The training step: loss, gradients, optimizer, each Keras' own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoshard.model.inputs import Input, model_inputs
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel
from autoshard.model.signature import (
    Arrays,
    Step,
    StepResult,
    data_argument,
    replaced,
    slot_argument,
    training_mode,
    variable_arguments,
)
from autoshard.model.slots import make_slots
from autoshard.model.workload import Workload

__all__ = ["train_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """What is minimised, in words and as a function of the outputs and of these data."""

    words: str
    function: Callable[..., Any]
    targets: tuple[Input, ...] = ()


def train_step(model: AbstractModel, workload: Workload) -> Step:
    """One step of `fit`: new weights, new optimizer variables and the loss."""
    import jax

    keras = import_keras()
    inputs, structure = model_inputs(model.model, workload)
    variables, n_trainable = variable_arguments(model.model)
    slots = make_slots(workload.optimizer, model.model.trainable_variables)
    loss = _loss(model, workload)
    ends = [n_trainable, len(variables), len(variables) + len(slots.slots)]
    ends.append(ends[-1] + len(inputs))

    def train(*arrays: Any) -> Arrays:
        trainable, other, opt = (
            list(arrays[start:end]) for start, end in zip([0, *ends[:2]], ends[:3], strict=True)
        )
        data = keras.tree.pack_sequence_as(structure, arrays[ends[2] : ends[3]])

        def total_loss(trainable: list[Any]) -> tuple[Any, list[Any]]:
            outputs, updated, extra = model.model.stateless_call(
                trainable, other, data, return_losses=True, **training_mode(model.model, True)
            )
            return sum(extra, loss.function(outputs, *arrays[ends[3] :])), updated

        (value, other), gradients = jax.value_and_grad(total_loss, has_aux=True)(trainable)
        trainable, opt = slots.optimizer.stateless_apply(opt, gradients, trainable)
        return (*trainable, *other, *opt, value)

    updated_arguments = (*variables, *map(slot_argument, slots.slots))
    return Step(
        function=train,
        arguments=(*updated_arguments, *map(data_argument, (*inputs, *loss.targets))),
        results=(*replaced(updated_arguments), StepResult(role="loss", path="loss")),
        task=model.task,
        loss=loss.words,
    )


def _loss(model: AbstractModel, workload: Workload) -> _Loss:
    keras = import_keras()
    if not model.generates:

        def mean_square(outputs: Any) -> Any:
            parts = [keras.ops.cast(o, "float32") for o in keras.tree.flatten(outputs)]
            return sum(keras.ops.mean(keras.ops.square(part)) for part in parts)

        return _Loss(words="mean square of the outputs", function=mean_square)

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def next_token(logits: Any, labels: Any, sample_weight: Any) -> Any:
        return cross_entropy(labels, logits, sample_weight)

    # As CausalLM.fit is fed by its preprocessor: the labels are the tokens one place on, their
    # weights the padding mask.
    shape = (workload.batch, workload.seq_len)
    return _Loss(
        words="sparse categorical cross-entropy of the next token, padding left out",
        function=next_token,
        targets=(
            Input(name="labels", shape=shape, dtype="int32"),
            Input(name="sample_weight", shape=shape, dtype="bool"),
        ),
    )
